"""From raw predictions to detections. B images, A anchors, K classes, D detections."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from detection.boxes import box_area, clip_boxes, decode_boxes, pairwise_iou
from detection.structures import Detections, RawPredictions

# Candidates that are compared with each other at a time.
BLOCK = 128


class Postprocess(nn.Module):
    """Decode, suppress and rank: the best detections of every image.

    Suppression is greedy and by class, by default on boxes that are not yet clipped, as the
    TensorFlow Object Detection API does it. It sees the `num_candidates` best (anchor, class)
    pairs of an image. What survives among them is exactly what would survive among all, as only
    better boxes suppress; so the result is the exact one wherever `max_detections` of them survive.

    Args:
        score_threshold: only scores above it are detections.
        iou_threshold: of two boxes of a class that overlap by more, the worse goes.
        num_candidates: k, at most all pairs.
        max_detections: D.
        per_level: k candidates of each feature map, as torchvision takes them.
        clip_first: suppress clipped boxes, as torchvision does.
    """

    def __init__(
        self,
        *,
        score_threshold: float = 1e-8,
        iou_threshold: float = 0.6,
        num_candidates: int = 1000,
        max_detections: int = 100,
        per_level: bool = False,
        clip_first: bool = False,
    ) -> None:
        super().__init__()
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.num_candidates = num_candidates
        self.max_detections = max_detections
        self.per_level = per_level
        self.clip_first = clip_first

    @torch.no_grad()
    def forward(self, predictions: RawPredictions, input_size: int) -> Detections:
        """Detections in pixels of the square input."""
        logits = predictions.logits[..., predictions.num_background :].float()
        scores, anchors, labels = self._select(logits, predictions.level_sizes)
        scores = scores.sigmoid()

        deltas = predictions.deltas.float().gather(1, anchors[..., None].expand(-1, -1, 4))
        unclipped = decode_boxes(deltas, predictions.anchors[anchors], predictions.code_weights)
        boxes = clip_boxes(unclipped, input_size, input_size)
        visible = box_area(boxes) > 0
        # Its loops depend on the data: an exported graph has one node for it.
        suppress = suppress_operator if torch.compiler.is_exporting() else _suppress
        survives = suppress(
            boxes if self.clip_first else unclipped,
            scores,
            labels,
            visible,
            logits.shape[2],
            self.score_threshold,
            self.iou_threshold,
            self.max_detections,
        )

        valid = survives & visible
        ranked = scores.masked_fill(~valid, -1.0)
        ranked, order = ranked.topk(min(self.max_detections, ranked.shape[1]), dim=1)
        valid = ranked > 0
        return Detections(
            boxes=boxes.gather(1, order[..., None].expand(-1, -1, 4)) * valid[..., None],
            scores=ranked.clamp(min=0),
            labels=labels.gather(1, order) * valid,
            valid=valid,
        )

    def _select(
        self, logits: Tensor, level_sizes: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates among logits (B, A, K), best first: logit, anchor and label, (B, N)."""
        if not (self.per_level and level_sizes):
            return _select_best(logits, self.num_candidates)
        levels = [
            _select_best(level, self.num_candidates) for level in logits.split(level_sizes, 1)
        ]
        scores, anchors, labels = zip(*levels, strict=True)
        starts = accumulate(level_sizes[:-1], initial=0)
        anchors = [own + start for own, start in zip(anchors, starts, strict=True)]
        best, order = torch.cat(scores, 1).sort(1, descending=True)
        return best, torch.cat(anchors, 1).gather(1, order), torch.cat(labels, 1).gather(1, order)


def _select_best(logits: Tensor, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best (anchor, class) pairs: logits (B, A, K) -> logit, anchor and label, (B, k)."""
    _, num_anchors, num_classes = logits.shape
    # The k best pairs lie on the k anchors that have the best maxima: few of all are sorted.
    anchors = logits.amax(2).topk(min(num_pairs, num_anchors), dim=1).indices
    rows = logits.gather(1, anchors[..., None].expand(-1, -1, num_classes)).flatten(1)
    best, pairs = rows.topk(min(num_pairs, rows.shape[1]), dim=1)
    return best, anchors.gather(1, pairs // num_classes), pairs % num_classes


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    visible: Tensor,
    num_classes: int,
    score_threshold: float,
    iou_threshold: float,
    num_needed: int,
) -> Tensor:
    """Greedy suppression within classes, of all images at once.

    A block of ranks at a time, until each image has what it needs: a table of all pairs would take
    the most of the time, as would one call of torchvision's `nms` for the whole batch.

    Args:
        boxes: (B, N, 4), best first.
        scores: (B, N), falling.
        labels: (B, N).
        visible: (B, N) bool, what counts for `num_needed`.
        num_classes: K, for the operator of other runtimes, which works by class.
        score_threshold: boxes of no higher score neither survive nor suppress.
        num_needed: an image may end with more, or with fewer where there are no more.

    Returns:
        (B, N) bool, True to keep.
    """
    candidates = scores > score_threshold
    survives = torch.zeros_like(candidates)
    if not candidates.any():
        return survives

    def overlap(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        same = own[1][:, :, None] == other[1][:, None, :]
        return same & (pairwise_iou(own[0], other[0]) > iou_threshold)

    for start in range(0, int(candidates.sum(1).max()), BLOCK):
        block = slice(start, start + BLOCK)
        own = boxes[:, block], labels[:, block]
        is_better, better = survives.byte().topk(int(survives.sum(1).max()))
        others = boxes.gather(1, better[..., None].expand(-1, -1, 4)), labels.gather(1, better)
        free = candidates[:, block] & ~(overlap(own, others) & (is_better > 0)[:, None]).any(2)
        within = overlap(own, own).tril(-1)
        keeps, settled = free, False
        while not settled:
            # Each round settles at least one more rank; few overlap in a long chain.
            before, keeps = keeps, free & ~(within & keeps[:, None, :]).any(2)
            settled = keeps.equal(before)
        survives[:, block] = keeps
        if (survives & visible).sum(1).min() >= num_needed:
            break
    return survives


suppress_operator = torch.library.custom_op("detection::suppress", _suppress, mutates_args=())


@suppress_operator.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, visible: Tensor, *_: object) -> Tensor:
    return torch.empty_like(visible)
