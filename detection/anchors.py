"""Anchor boxes. A anchors in all; the order is level, row, column, anchor of the cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def ssd_anchor_sizes(
    num_levels: int,
    *,
    min_scale: float = 0.2,
    max_scale: float = 0.95,
    reduce_boxes_in_lowest_layer: bool = True,
) -> list[list[tuple[float, float]]]:
    """(width, height) of each level's anchors, relative to the input.

    The rule of the TensorFlow Object Detection API's `ssd_anchor_generator`: scales evenly spaced,
    six anchors a level, the last at the geometric mean of two neighbouring scales (1.0 follows the
    last); three on the first level where `reduce_boxes_in_lowest_layer`.
    """
    step = (max_scale - min_scale) / max(num_levels - 1, 1)
    scales = [min_scale + step * level for level in range(num_levels)] + [1.0]
    sizes = []
    for level, (scale, next_scale) in enumerate(pairwise(scales)):
        if level == 0 and reduce_boxes_in_lowest_layer:
            boxes = [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
        else:
            # The API's configuration writes a third as 0.3333.
            boxes = [(scale, ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)]
            boxes.append((math.sqrt(scale * next_scale), 1.0))
        sizes.append([(s * math.sqrt(ratio), s / math.sqrt(ratio)) for s, ratio in boxes])
    return sizes


def retinanet_anchor_sizes(
    strides: Sequence[int],
    *,
    input_size: int,
    scale: float = 4.0,
    num_scales: int = 3,
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    whole_pixels: bool = False,
) -> list[list[tuple[float, float]]]:
    """(width, height) of each level's anchors, relative to the input (Lin et al., 2017).

    On a level of stride s they have the area of squares with sides `scale` * s * 2^(k / n), k from
    0 to below n = `num_scales`, at each ratio. The order is ratio, scale.

    Args:
        strides: of the levels, in pixels.
        input_size: side of the square input in pixels.
        ratios: height / width.
        whole_pixels: round as torchvision's RetinaNet: sides down, widths and heights to even.
    """
    levels = []
    for stride in strides:
        sides = [scale * stride * 2 ** (k / num_scales) for k in range(num_scales)]
        sides = [float(int(side)) for side in sides] if whole_pixels else sides
        sizes = [(s / math.sqrt(ratio), s * math.sqrt(ratio)) for ratio in ratios for s in sides]
        if whole_pixels:
            sizes = [(2.0 * round(w / 2), 2.0 * round(h / 2)) for w, h in sizes]
        levels.append([(width / input_size, height / input_size) for width, height in sizes])
    return levels


def grid_anchors(
    sizes: Sequence[Sequence[tuple[float, float]]],
    grids: Sequence[tuple[int, int]],
    input_size: int,
    *,
    centered: bool = True,
) -> Tensor:
    """Anchors in the cells of each level's grid.

    Args:
        sizes: for each level, the (width, height) of its anchors relative to the input.
        grids: for each level, (rows, columns) of its feature map.
        input_size: side of the square input in pixels.
        centered: around the middle of each cell; False takes its upper left corner, and cells of
            whole pixels, as torchvision's `AnchorGenerator`.

    Returns:
        (A, 4) float32, xyxy in input pixels, not clipped.
    """
    levels = []
    for level_sizes, (rows, columns) in zip(sizes, grids, strict=True):
        y, x = (_cell_centers(count, input_size, centered) for count in (rows, columns))
        centers = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
        half = torch.tensor(level_sizes, dtype=torch.float64) / 2
        centers = centers[:, :, None].expand(-1, -1, len(half), -1)
        levels.append(torch.cat([centers - half, centers + half], dim=-1).view(-1, 4))
    return (torch.cat(levels) * input_size).float()


def _cell_centers(count: int, input_size: int, centered: bool) -> Tensor:
    """Along one side, relative to the input."""
    cells = torch.arange(count, dtype=torch.float64)
    return (cells + 0.5) / count if centered else cells * (input_size // count) / input_size
