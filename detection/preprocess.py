"""From images as they are to what a network takes, and boxes back again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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
            channels = [value] * 3 if isinstance(value, (int, float)) else list(value)
            tensor = torch.tensor(channels, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float32 (B, 3, S, S)."""
        return (images.float() - self.mean) / self.std

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
