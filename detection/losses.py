"""The criterion of one-stage detectors, batched. B images, A anchors, S class slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.boxes import encode_boxes
from detection.matching import match_anchors
from detection.structures import RawPredictions, Targets


class Losses(NamedTuple):
    """Loss sums over a batch and what they are to be divided by.

    Sums can be added over processes and accumulation steps, so that the division by the number of
    matches happens once, over the whole batch.

    Args:
        sums: weighted sums by name; their total is what is differentiated.
        num_matches: () float, matched anchors of the batch.
    """

    sums: dict[str, Tensor]
    num_matches: Tensor

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.sums.values())).sum()


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss (Lin et al., 2017, equation 5), elementwise.

    Args:
        logits: any shape.
        targets: the same shape, 0 or 1.
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    miss = probability + targets - 2 * probability * targets  # 1 - p_t
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * miss**gamma * loss


class SSDCriterion(nn.Module):
    """Focal classification loss on every anchor, smooth L1 on the codes of the matched ones.

    As the TensorFlow Object Detection API computes it: slot 0 of the logits is background, whose
    target is all zeros; the box loss is divided by the code size.

    Args:
        match_threshold: IoU from which an anchor takes a ground truth.
        alpha: focal weight of positives.
        gamma: focal exponent.
        beta: where smooth L1 turns from quadratic to linear.
        classification_weight: weight of the class loss.
        localization_weight: weight of the box loss.
    """

    def __init__(
        self,
        *,
        match_threshold: float = 0.5,
        alpha: float = 0.75,
        gamma: float = 2.0,
        beta: float = 1.0,
        classification_weight: float = 1.0,
        localization_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.match_threshold = match_threshold
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta
        self.classification_weight = classification_weight
        self.localization_weight = localization_weight

    def forward(self, predictions: RawPredictions, targets: Targets) -> Losses:
        """Loss sums, in float32 also under autocast."""
        deltas, logits = predictions.deltas.float(), predictions.logits.float()
        match = match_anchors(predictions.anchors, targets, threshold=self.match_threshold)
        slots = assign_slots(match, targets)
        one_hot = F.one_hot(slots, logits.shape[-1]).to(logits.dtype)
        one_hot[..., 0] = 0
        classification = sigmoid_focal_loss(logits, one_hot, alpha=self.alpha, gamma=self.gamma)
        codes = assign_codes(match, targets, predictions.anchors)
        localization = F.smooth_l1_loss(deltas, codes, beta=self.beta, reduction="none").mean(-1)
        matched = match >= 0
        sums = {
            "classification": self.classification_weight * classification.sum(),
            "localization": self.localization_weight * (localization * matched).sum(),
        }
        return Losses(sums, matched.sum().float())


def assign_slots(match: Tensor, targets: Targets) -> Tensor:
    """Class slot of each anchor: 1 + label where matched, else 0. match (B, A) -> (B, A) int64."""
    if targets.labels.shape[1] == 0:
        return torch.zeros_like(match)
    labels = targets.labels.gather(1, match.clamp(min=0))
    return torch.where(match >= 0, labels + 1, 0)


def assign_codes(match: Tensor, targets: Targets, anchors: Tensor) -> Tensor:
    """Box codes each anchor should give, zeros where unmatched. match (B, A) -> (B, A, 4)."""
    if targets.boxes.shape[1] == 0:
        return anchors.new_zeros(*match.shape, 4)
    matched = (match >= 0)[..., None]
    boxes = targets.boxes.gather(1, match.clamp(min=0)[..., None].expand(-1, -1, 4))
    # An unmatched anchor encodes itself: a padded box has no size, and its logarithm no value.
    return encode_boxes(torch.where(matched, boxes, anchors), anchors)
