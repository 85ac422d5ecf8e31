"""From images as they are to what a network takes, and boxes back again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F


class Preprocess(nn.Module):
    """Resize to a square, whatever the aspect, and normalise: (x - mean) / std.

    Resizing works on uint8 images one by one, where they are loaded; normalising on the batch,
    where the network runs.

    Args:
        input_size: side of the network's input in pixels.
        mean: of all channels or of each, on the scale 0 to 255.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        input_size: int,
        mean: float | Sequence[float] = 127.5,
        std: float | Sequence[float] = 127.5,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        for name, value in (("mean", mean), ("std", std)):
            tensor = torch.tensor(_of_channels(value), dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float32 (B, 3, S, S)."""
        return (images.float() - self.mean) / self.std

    def for_loading(self) -> Self:
        """A copy on the CPU, for datasets: what goes to a loader's worker may hold no device."""
        return copy.deepcopy(self).cpu()

    def at_size(self, input_size: int) -> Self:
        """The same for another input size."""
        other = copy.deepcopy(self)
        other.input_size = input_size
        return other

    def fit(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Where images come to lie in the input, in its pixels.

        Args:
            sizes: (B, 2), height and width of each.

        Returns:
            (B, 2) and (B, 2): their heights and widths there, and their upper left corners (y, x).
        """
        return torch.full_like(sizes, self.input_size), torch.zeros_like(sizes)

    def resize(
        self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes
    ) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]:
        """uint8 image (3, H, W) and boxes (N, 4) in its pixels -> the same at (3, S, S)."""
        resized_boxes = F.resize(boxes, [self.input_size, self.input_size])
        return cast(
            "tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]",
            (self.resize_image(image), resized_boxes),
        )

    def resize_image(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) -> (3, S, S)."""
        return F.resize(image, [self.input_size, self.input_size], antialias=True)

    def restore(self, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Boxes of the network's input in pixels of the original images.

        Args:
            boxes: (B, N, 4).
            sizes: (B, 2), height and width of each original image.
        """
        scale = sizes.flip(-1).to(boxes.dtype).repeat(1, 2)[:, None] / self.input_size
        return boxes * scale


class Letterbox(Preprocess):
    """`Preprocess` that keeps the aspect: the longer side fills the square, the rest is padded.

    Args:
        input_size: side of the network's input in pixels.
        mean: as in `Preprocess`; the padding has it too, rounded.
        std: as in `Preprocess`.
        centered: pad both ends of the shorter side; else the right or the bottom.
    """

    def __init__(
        self,
        *,
        input_size: int,
        mean: float | Sequence[float] = 127.5,
        std: float | Sequence[float] = 127.5,
        centered: bool = False,
    ) -> None:
        super().__init__(input_size=input_size, mean=mean, std=std)
        self.centered = centered
        self.fill = [float(round(value)) for value in _of_channels(mean)]

    def resize(
        self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes
    ) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]:
        size, padding = self._place(image.shape[-2:])
        padded_boxes = F.pad(F.resize(boxes, size), padding)
        return cast(
            "tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]",
            (self.resize_image(image), padded_boxes),
        )

    def resize_image(self, image: Tensor) -> Tensor:
        size, padding = self._place(image.shape[-2:])
        return F.pad(F.resize(image, size, antialias=True), padding, fill=self.fill)

    def restore(self, boxes: Tensor, sizes: Tensor) -> Tensor:
        """As in `Preprocess`; what reaches into the padding is cut off."""
        fitted, start = self.fit(sizes)
        scale, start = (
            values.flip(-1).to(boxes.dtype).repeat(1, 2)[:, None]
            for values in (sizes / fitted, start)
        )
        limit = sizes.flip(-1).to(boxes.dtype).repeat(1, 2)[:, None]
        return ((boxes - start) * scale).clamp(min=0).minimum(limit)

    def _place(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Of an image (height, width): its size in the input, padding left, top, right, bottom."""
        fitted, start = (values[0].tolist() for values in self.fit(torch.tensor([list(size)])))
        bottom, right = (self.input_size - s - f for s, f in zip(start, fitted, strict=True))
        return fitted, [start[1], start[0], right, bottom]

    def fit(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        longer = sizes.amax(1, keepdim=True)
        # In whole numbers, so that resizing and restoring round alike.
        fitted = ((2 * sizes * self.input_size + longer) // (2 * longer)).clamp(min=1)
        start = (self.input_size - fitted) // 2 if self.centered else torch.zeros_like(fitted)
        return fitted, start


def _of_channels(value: float | Sequence[float]) -> list[float]:
    values: list[float] = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if len(values) != 3:
        raise ValueError(
            f"mean and std are one number, or one for each of 3 channels, not {values}"
        )
    return values
