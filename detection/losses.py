"""The criterion of one-stage detectors, batched.

Shapes: B images, A anchors, G ground truths, S class slots, M matched anchors of the batch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import generalized_box_iou_loss

from detection.boxes import decode_boxes, encode_boxes
from detection.matching import IGNORED, match_anchors
from detection.structures import RawPredictions, Targets

# Logits at a time: few enough for a processor's cache.
CHUNK = 2**18


class Losses(NamedTuple):
    """Loss sums over a batch and what they are to be divided by.

    Sums can be added over processes and accumulation steps, so that the division happens once,
    over the whole batch.

    Args:
        sums: weighted sums by name; their total is what is differentiated.
        divisor: () float: matched anchors of the batch; or its images, where each image's share of
            the sums is divided by its own matches.
    """

    sums: dict[str, Tensor]
    divisor: Tensor

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.sums.values())).sum()


class Matches(NamedTuple):
    """The matched anchors of a batch, those of all images in a row.

    Args:
        images: (M,) int64, index of the image.
        anchors: (M,) int64, index of the anchor.
        labels: (M,) int64, class of its ground truth.
        boxes: (M, 4), its ground truth.
    """

    images: Tensor
    anchors: Tensor
    labels: Tensor
    boxes: Tensor


class FocalCriterion(nn.Module):
    """Focal classification loss on every anchor, box loss on the matched ones.

    The defaults are those of the TensorFlow Object Detection API's SSD: background is a target of
    zeros in all slots, its own slot too; smooth L1 is the mean over a box's four codes.
    torchvision's RetinaNet has `background_threshold=0.4`, `keep_ties=True`, `alpha=0.25`,
    `per_image=True`, and either L1 (`beta=0`) summed over the codes (`localization_weight=4`), or
    `box_loss="giou"`.

    Args:
        match_threshold: IoU from which an anchor takes a ground truth.
        background_threshold: as in `match_anchors`; ignored anchors have no class loss.
        keep_ties: as in `match_anchors`.
        alpha: focal weight of positives.
        gamma: focal exponent.
        box_loss: "smooth_l1" of the codes, or "giou" of the boxes.
        beta: where smooth L1 turns from quadratic to linear; 0 is L1.
        classification_weight: weight of the class loss.
        localization_weight: weight of the box loss.
        per_image: divide each image's losses by its own matches, then by the number of images;
            else all by the matches of the batch.
    """

    def __init__(
        self,
        *,
        match_threshold: float = 0.5,
        background_threshold: float | None = None,
        keep_ties: bool = False,
        alpha: float = 0.75,
        gamma: float = 2.0,
        box_loss: Literal["smooth_l1", "giou"] = "smooth_l1",
        beta: float = 1.0,
        classification_weight: float = 1.0,
        localization_weight: float = 1.0,
        per_image: bool = False,
    ) -> None:
        super().__init__()
        if box_loss not in ("smooth_l1", "giou"):
            raise ValueError(f'box_loss must be "smooth_l1" or "giou", got {box_loss!r}')
        self.match_threshold = match_threshold
        self.background_threshold = background_threshold
        self.keep_ties = keep_ties
        self.alpha = alpha
        self.gamma = gamma
        self.box_loss = box_loss
        self.beta = beta
        self.classification_weight = classification_weight
        self.localization_weight = localization_weight
        self.per_image = per_image

    def forward(self, predictions: RawPredictions, targets: Targets) -> Losses:
        """Loss sums, in float32 also under autocast."""
        match = match_anchors(
            predictions.anchors,
            targets,
            threshold=self.match_threshold,
            background_threshold=self.background_threshold,
            keep_ties=self.keep_ties,
        )
        matches = gather_matches(match, targets)
        num_matches = (match >= 0).sum(1).float()
        share = 1 / num_matches.clamp(min=1) if self.per_image else torch.ones_like(num_matches)
        classification = self.classification_loss(predictions, match, matches, share)
        localization = (self.localization_loss(predictions, matches) * share[matches.images]).sum()
        sums = {
            "classification": self.classification_weight * classification,
            "localization": self.localization_weight * localization,
        }
        divisor = torch.ones_like(num_matches) if self.per_image else num_matches
        return Losses(sums, divisor.sum())

    def classification_loss(
        self, predictions: RawPredictions, match: Tensor, matches: Matches, share: Tensor
    ) -> Tensor:
        """Sum over all slots of all anchors, each image's times its share (B,)."""
        weights = share[:, None]
        if self.background_threshold is not None:
            weights = weights * (match != IGNORED)
        slots = matches.labels + predictions.num_background
        return _FocalSum.apply(
            predictions.logits, weights, matches.images, matches.anchors, slots,
            self.alpha, self.gamma,
        )  # pyright: ignore[reportReturnType]  # fmt: skip

    def localization_loss(self, predictions: RawPredictions, matches: Matches) -> Tensor:
        """(M,), of each matched anchor."""
        deltas = predictions.deltas[matches.images, matches.anchors].float()
        anchors, weights = predictions.anchors[matches.anchors], predictions.code_weights
        if self.box_loss == "giou":
            return generalized_box_iou_loss(decode_boxes(deltas, anchors, weights), matches.boxes)
        codes = encode_boxes(matches.boxes, anchors, weights)
        return F.smooth_l1_loss(deltas, codes, beta=self.beta, reduction="none").mean(-1)


class _FocalSum(torch.autograd.Function):
    """Focal losses (Lin et al., 2017, equation 5) of all slots, summed with a weight an anchor.

    The derivative comes with the loss: the logits are most of what a criterion sees, and autograd
    would pass over them several times more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        weights: Tensor,
        images: Tensor,
        anchors: Tensor,
        slots: Tensor,
        alpha: float,
        gamma: float,
    ) -> Tensor:
        """logits (B, A, S), weights (B, A) or (B, 1); images, anchors, slots (M,): where the target
        is 1.
        """
        # Positives' logits become -inf: as negatives they then add neither loss nor derivative.
        derivative = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        positive = -derivative[images, anchors, slots]
        derivative[images, anchors, slots] = -torch.inf
        sums = derivative.new_empty(logits.shape[:2])
        size = max(1, sums.numel() if logits.is_cuda else CHUNK // logits.shape[-1])
        for x, row_sums in zip(
            derivative.flatten(0, 1).split(size), sums.flatten().split(size), strict=True
        ):
            torch.sum(_focal_loss_(x, gamma), 1, out=row_sums)
        weight = alpha * weights.expand_as(sums)[images, anchors]
        # A dot product would depend on where its factors lie in memory.
        total = (1 - alpha) * (sums * weights).sum()
        total += (weight * _focal_loss_(positive, gamma)).sum()
        ctx.save_for_backward(
            derivative, (1 - alpha) * weights, images, anchors, slots, -weight * positive
        )
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        derivative, weights, images, anchors, slots, positive = ctx.saved_tensors
        derivative.mul_((gradient * weights)[..., None])
        derivative[images, anchors, slots] = gradient * positive
        return derivative.to(ctx.dtype), *[None] * 6


def _focal_loss_(x: Tensor, gamma: float) -> Tensor:
    """Of logits whose target is 0, p ** gamma times the cross-entropy; x becomes its derivative."""
    p = x.sigmoid()
    power = p**gamma
    # Softplus in half the time; it errs by 1e-7 only where p is small too.
    loss = torch.maximum(p, 1 - p).log_()
    torch.sub(x.clamp_(min=0), loss, out=loss).mul_(power)
    # p ** gamma * (p + gamma * (1 - p) * entropy)
    torch.lerp(torch.mul(loss, gamma, out=x), power, p, out=x)
    return loss


def gather_matches(match: Tensor, targets: Targets) -> Matches:
    """match (B, A), as `match_anchors` gives it -> the matched anchors."""
    images, anchors = (match >= 0).nonzero(as_tuple=True)
    truths = match[images, anchors]
    return Matches(images, anchors, targets.labels[images, truths], targets.boxes[images, truths])
