"""What SSD and RetinaNet have in common: anchors on the grids of their feature maps.

Shapes: B images, S side of the input, A anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from condconv.modes import keep_modes
from detection.errors import first_line


class AnchorLayout(NamedTuple):
    """The anchors of an input size.

    Args:
        anchors: (A, 4) float32, xyxy in input pixels.
        level_sizes: anchors of each level.
    """

    anchors: Tensor
    level_sizes: tuple[int, ...]


class AnchorNetwork(nn.Module):
    """A network of square inputs, whose anchors lie on the grids of its feature maps.

    It takes inputs of `input_size`; of others after `take_sizes`.
    """

    input_size: int
    anchors: Tensor
    level_sizes: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self.other_layouts: dict[int, AnchorLayout] = {}

    def extract_levels(self, images: Tensor) -> Sequence[Tensor]:
        """images (B, 3, S, S) -> the feature map of each level, finest first."""
        raise NotImplementedError

    def lay_anchors(self, grids: Sequence[tuple[int, int]], input_size: int) -> AnchorLayout:
        """The anchors that the network would have were it built for `input_size`.

        Args:
            grids: (rows, columns) of each level's map.
        """
        raise NotImplementedError

    def trace_levels(self, input_size: int) -> list[tuple[int, int, int]]:
        """(channels, rows, columns) of each level for a square input.

        Raises:
            ValueError: where the network cannot take that size.
        """
        image = next(self.parameters()).new_zeros(1, 3, input_size, input_size)
        try:
            with keep_modes(self.modules()), torch.no_grad():
                levels = self.eval().extract_levels(image)
        # The layers of any backbone, which answer a size they cannot take in their own way.
        except Exception as error:
            reason = first_line(error)
            raise ValueError(
                f"the backbone cannot take images of {input_size} x {input_size}: {reason}"
            ) from error
        return [(level.shape[1], level.shape[2], level.shape[3]) for level in levels]

    def set_anchors(self, levels: Sequence[tuple[int, int, int]]) -> None:
        """Have the anchors of `input_size`, for its levels as `trace_levels` gives them."""
        device = torch.get_default_device()
        # No state dict has them: a network without weights has its anchors all the same.
        with torch.device("cpu") if device.type == "meta" else device:
            grids = [(rows, columns) for _, rows, columns in levels]
            anchors, self.level_sizes = self.lay_anchors(grids, self.input_size)
        self.register_buffer("anchors", anchors, persistent=False)

    def take_sizes(self, input_sizes: Sequence[int]) -> None:
        """Take square inputs of these sides too, each with the anchors of a network built for it.

        Raises:
            ValueError: where the backbone cannot take one.
        """
        for size in {*input_sizes} - {self.input_size}:
            grids = [(rows, columns) for _, rows, columns in self.trace_levels(size)]
            anchors, level_sizes = self.lay_anchors(grids, size)
            # No buffers: DistributedDataParallel would send them all at each step.
            anchors = anchors.to(self.anchors.device)
            self.other_layouts[size] = AnchorLayout(anchors, level_sizes)

    def find_anchors(self, images: Tensor) -> AnchorLayout:
        """The anchors for images (B, 3, H, W).

        Raises:
            ValueError: where they have no size that the network takes.
        """
        height, width = images.shape[-2:]
        if (height, width) == (self.input_size, self.input_size):
            return AnchorLayout(self.anchors, self.level_sizes)
        if height == width and width in self.other_layouts:
            return self.other_layouts[width]
        raise ValueError(
            f"the network takes {self.input_size} x {self.input_size} images, "
            f"got {height} x {width}"
        )
