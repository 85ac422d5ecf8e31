"""The data that flows between the parts.

Shapes: B images, A anchors, G ground truths (padded), D detections (padded), S class slots.
Boxes are xyxy in pixels of the network's input; labels are contiguous from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Category(NamedTuple):
    """One class of a data set; its place in the category table is its label.

    Args:
        id: the data set's own id (COCO's have gaps).
        name: the class name.
    """

    id: int
    name: str


class Targets(NamedTuple):
    """Ground truth of a batch, padded to the image with the most boxes.

    Args:
        boxes: (B, G, 4) float32, xyxy in input pixels; zeros where padded.
        labels: (B, G) int64, contiguous from 0; zeros where padded.
        valid: (B, G) bool, False where padded.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return Targets(*(field.to(device, non_blocking=non_blocking) for field in self))


class RawPredictions(NamedTuple):
    """What a detector network gives before decoding.

    Args:
        deltas: (B, A, 4) box codes relative to the anchors.
        logits: (B, A, S) one logit a class slot (SSD's slot 0 is background).
        anchors: (A, 4) float32, xyxy in input pixels.
    """

    deltas: Tensor
    logits: Tensor
    anchors: Tensor


class Detections(NamedTuple):
    """Detections of a batch, best first, padded to a fixed number.

    Args:
        boxes: (B, D, 4) float32, xyxy.
        scores: (B, D) float32 in [0, 1]; zeros where padded.
        labels: (B, D) int64.
        valid: (B, D) bool, False where padded.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor


class ImageDetections(NamedTuple):
    """Detections of one image, best first, nothing padded.

    Args:
        boxes: (N, 4) float32, xyxy in pixels of the image as it was given.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, contiguous from 0.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
