"""Box arithmetic, batched. All boxes are xyxy unless a name says otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

CodeWeights = tuple[float, float, float, float]
# Faster R-CNN's codes: centre offsets and log sizes, scaled by these (x, y, w, h).
CODE_WEIGHTS: CodeWeights = (10.0, 10.0, 5.0, 5.0)


def box_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...)."""
    sizes = boxes[..., 2:] - boxes[..., :2]
    return sizes[..., 0] * sizes[..., 1]


def pairwise_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        boxes_a: (..., N, 4).
        boxes_b: (..., M, 4), leading dimensions broadcast.

    Returns:
        (..., N, M); 0 where the union is empty.
    """
    left_a, top_a, right_a, bottom_a = boxes_a[..., :, None, :].unbind(-1)
    # Each coordinate in a row: pairs of coordinates would take twice as long. Tables of all pairs
    # are large: what is in one is overwritten.
    left_b, top_b, right_b, bottom_b = torch.stack(boxes_b[..., None, :, :].unbind(-1))
    width = torch.minimum(right_a, right_b).sub_(torch.maximum(left_a, left_b)).clamp_(min=0)
    height = torch.minimum(bottom_a, bottom_b).sub_(torch.maximum(top_a, top_b)).clamp_(min=0)
    intersection = width.mul_(height)
    # Without any area 0 / 0 would be NaN: a tiny one makes it 0.
    area_a = ((right_a - left_a) * (bottom_a - top_a)).clamp_(min=torch.finfo(boxes_a.dtype).tiny)
    union = (area_a + (right_b - left_b) * (bottom_b - top_b)).sub_(intersection)
    return intersection.div_(union)


def pairwise_coverage(windows: Tensor, boxes: Tensor) -> Tensor:
    """The share of each box's area that lies inside each window.

    Args:
        windows: (..., C, 4).
        boxes: (..., N, 4), leading dimensions broadcast.

    Returns:
        (..., C, N); 0 for a box without area.
    """
    windows, boxes = windows[..., :, None, :], boxes[..., None, :, :]
    corners_min = torch.maximum(windows[..., :2], boxes[..., :2])
    corners_max = torch.minimum(windows[..., 2:], boxes[..., 2:])
    inside = (corners_max - corners_min).clamp(min=0).prod(-1)
    areas = box_area(boxes)
    return torch.where(areas > 0, inside / areas, 0.0)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: CodeWeights = CODE_WEIGHTS) -> Tensor:
    """Codes of boxes relative to anchors (Ren et al., 2015).

    Args:
        boxes: (..., A, 4), of positive size.
        anchors: (A, 4).
        weights: factors on the codes.

    Returns:
        (..., A, 4): dx, dy, dw, dh.
    """
    center, size = _center_size(boxes)
    anchor_center, anchor_size = _center_size(anchors)
    codes = torch.cat([(center - anchor_center) / anchor_size, (size / anchor_size).log()], dim=-1)
    return codes * codes.new_tensor(weights)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: CodeWeights = CODE_WEIGHTS) -> Tensor:
    """The inverse of `encode_boxes`: codes (..., A, 4) at anchors (..., A, 4) -> boxes."""
    deltas = deltas / deltas.new_tensor(weights)
    anchor_center, anchor_size = _center_size(anchors)
    center = deltas[..., :2] * anchor_size + anchor_center
    # A bound far outside any image keeps an untrained network from giving infinite boxes.
    half = deltas[..., 2:].clamp(max=10).exp() * anchor_size / 2
    return torch.cat([center - half, center + half], dim=-1)


def clip_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """(..., 4) boxes cut at the borders of an image."""
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + size / 2, size
