"""The data that flows between the parts.

Shapes: B images, A anchors, G ground truths (padded), D detections (padded), S class slots.
Boxes are xyxy in pixels of the network's input; labels are contiguous from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detection.boxes import CODE_WEIGHTS, CodeWeights


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
        logits: (B, A, S) one logit a class slot.
        anchors: (A, 4) float32, xyxy in input pixels.
        num_background: the first slots that are no class: SSD's slot 0 is background.
        code_weights: factors on the codes, as in `detection.boxes.encode_boxes`.
        level_sizes: anchors of each feature map, in their order; empty where that is not told.
    """

    deltas: Tensor
    logits: Tensor
    anchors: Tensor
    num_background: int = 1
    code_weights: CodeWeights = CODE_WEIGHTS
    level_sizes: tuple[int, ...] = ()


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
        names: the class names by label.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()
