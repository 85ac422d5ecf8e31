"""Which ground truth each anchor answers for. B images, A anchors, G ground truths."""

from __future__ import annotations

import torch
from torch import Tensor

from detection.boxes import pairwise_iou
from detection.structures import Targets

UNMATCHED = -1
IGNORED = -2


def match_anchors(
    anchors: Tensor,
    targets: Targets,
    *,
    threshold: float = 0.5,
    background_threshold: float | None = None,
    keep_ties: bool = False,
) -> Tensor:
    """Match anchors to ground truths.

    An anchor takes the ground truth it overlaps most where their IoU reaches the threshold. Every
    ground truth also takes the anchor that overlaps it most, whatever the IoU: the first of
    equals; where two take the same anchor, the lower ground truth keeps it (the TensorFlow Object
    Detection API's `ArgMaxMatcher` with `force_match_for_each_row`).

    Args:
        anchors: (A, 4).
        threshold: above 0, as `background_threshold`: padding overlaps by 0.
        background_threshold: an anchor whose best IoU lies from here to below the threshold is
            neither matched nor background; None ignores none.
        keep_ties: torchvision's `Matcher` with `allow_low_quality_matches`: all anchors that
            overlap a ground truth as much as its best one are matched, each with the ground truth
            that it overlaps most, be it another.

    Returns:
        (B, A) int64, the index of the ground truth, or -1 for background, -2 for ignored.
    """
    num_anchors, num_truths = anchors.shape[0], targets.boxes.shape[1]
    if num_truths == 0:
        return targets.labels.new_full((targets.labels.shape[0], num_anchors), UNMATCHED)
    # Padding is made to overlap nothing.
    boxes = targets.boxes.masked_fill(~targets.valid[..., None], 0)
    iou = pairwise_iou(boxes, anchors)  # (B, G, A)
    if keep_ties:
        # A ground truth that touches no anchor would be as near to all of them.
        highest = iou.amax(dim=2, keepdim=True).clamp(min=torch.finfo(iou.dtype).tiny)
        matched = (iou >= highest).any(dim=1)
        best_iou, best_truth = iou.max(dim=1)
        matched |= best_iou >= threshold
    else:
        # More than any IoU; and of equal ones, `max` takes the first.
        forced = 2 * targets.valid[..., None].to(iou.dtype)
        best_iou, best_truth = iou.scatter_(2, iou.argmax(dim=2, keepdim=True), forced).max(dim=1)
        matched = best_iou >= threshold
    match = torch.where(matched, best_truth, UNMATCHED)
    if background_threshold is not None:
        match.masked_fill_(~matched & (best_iou >= background_threshold), IGNORED)
    return match
