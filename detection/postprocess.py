"""From raw predictions to detections. B images, A anchors, K classes, D detections."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from detection.boxes import decode_boxes, pairwise_iou
from detection.structures import Detections, RawPredictions

# Boxes of a batch up to which comparing all with all takes less time than rounds, on a CPU.
MAX_PAIRED = 1500
# Scores that are sorted or left out together.
ROWS = 8


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
        num_classes = predictions.logits.shape[2] - predictions.num_background
        scores, anchors, labels = self._select(predictions)

        deltas = predictions.deltas.float().gather(1, anchors[..., None].expand(-1, -1, 4))
        unclipped = decode_boxes(deltas, predictions.anchors[anchors], predictions.code_weights)
        boxes = unclipped.clamp(0, input_size)
        visible = (boxes[..., :2] < boxes[..., 2:]).all(-1)
        # Its loops depend on the data: an exported graph has one node for it.
        suppress = suppress_operator if torch.compiler.is_exporting() else _suppress
        survives = suppress(
            boxes if self.clip_first else unclipped,
            scores,
            labels,
            visible,
            num_classes,
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

    def _select(self, predictions: RawPredictions) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates, best first: score, anchor and label of each, (B, N)."""
        logits = predictions.logits[..., predictions.num_background :]
        num_classes = logits.shape[2]
        sizes = predictions.level_sizes if self.per_level else ()
        starts = accumulate(sizes[:-1], initial=0)
        best = []
        for level, start in zip(logits.split(sizes or logits.shape[1], 1), starts, strict=True):
            pairs = level.flatten(1)
            scores, places = _top(pairs, min(self.num_candidates, pairs.shape[1]))
            best.append((scores, places + num_classes * start))
        scores, places = (torch.cat(fields, 1) for fields in zip(*best, strict=True))
        if len(best) > 1:
            scores, order = scores.sort(1, descending=True)
            places = places.gather(1, order)
        return scores.float().sigmoid(), places // num_classes, places % num_classes


def _top(values: Tensor, k: int, ranked: bool = True) -> tuple[Tensor, Tensor]:
    """The k best of each row of values (B, N), best first if `ranked`, and their places."""
    num_columns = values.shape[1] // ROWS
    if num_columns <= k:
        return values.topk(k, dim=1, sorted=ranked)
    # As a table they are in the k columns of the best maxima, or in what is left over: few of all
    # are sorted. The maximum across rows takes a fraction of that of neighbours.
    starts = num_columns * torch.arange(ROWS, device=values.device)[:, None]
    table = values[:, : ROWS * num_columns].unflatten(1, (ROWS, num_columns))
    _, columns = _top(table.amax(1), k, ranked=False)
    places = (columns[:, None] + starts).flatten(1)
    if values.shape[1] % ROWS:
        left_over = torch.arange(ROWS * num_columns, values.shape[1], device=values.device)
        places = torch.cat([places, left_over.expand(values.shape[0], -1)], dim=1)
    best, order = values.gather(1, places).topk(k, dim=1, sorted=ranked)
    return best, places.gather(1, order)


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

    Args:
        boxes: (B, N, 4), best first.
        scores: (B, N), falling.
        labels: (B, N).
        visible: (B, N) bool, what counts for `num_needed`.
        num_classes: K.
        score_threshold: boxes of no higher score neither survive nor suppress.
        num_needed: more survivors of a class are not looked for.

    Returns:
        (B, N) bool, True to keep.
    """
    groups = labels + num_classes * torch.arange(len(labels), device=labels.device)[:, None]
    left = scores > score_threshold
    survives = torch.zeros_like(left)
    few = 3 * num_needed
    if few < left.shape[1]:
        # Only better boxes suppress: what is needed is often found among the few best.
        survives[:, :few] = _survivors(
            left[:, :few], boxes[:, :few], groups[:, :few], visible[:, :few],
            iou_threshold, num_needed,
        )  # fmt: skip
        is_short = left[:, few] & ((survives & visible).sum(1) < num_needed)
        if not is_short.any():
            return survives
        left &= is_short[:, None]
    return survives | _survivors(left, boxes, groups, visible, iou_threshold, num_needed)


def _survivors(
    left: Tensor,
    boxes: Tensor,
    groups: Tensor,
    visible: Tensor,
    iou_threshold: float,
    num_needed: int,
) -> Tensor:
    """`_suppress` of those that left (B, N) has, within groups (B, N)."""
    places = left.flatten().nonzero()[:, 0]
    boxes, groups = boxes.flatten(0, 1)[places], groups.flatten()[places]
    if boxes.is_cuda or len(boxes) <= MAX_PAIRED:
        # Each group is moved to a place of its own. In float64, as the distance would cost float32
        # its fractions of a pixel.
        span = boxes.abs().amax().double() * 2 + 1 if len(boxes) else 1.0
        # Of a group, the first are the best.
        ranks = torch.arange(len(boxes), 0, -1, dtype=torch.float64, device=boxes.device)
        kept = nms(boxes.double() + (groups * span)[:, None], ranks, iou_threshold)
    else:
        # Boxes that cannot be seen survive, but do not count.
        num_rounds = num_needed + int((~visible.flatten()[places]).sum())
        kept = _suppress_in_rounds(boxes, groups, iou_threshold, num_rounds)
    survives = torch.zeros_like(left)
    survives.view(-1)[places[kept]] = True
    return survives


def _suppress_in_rounds(
    boxes: Tensor, groups: Tensor, iou_threshold: float, num_rounds: int
) -> Tensor:
    """Boxes (M, 4), best first in their groups (M,) -> indices of those that are kept.

    Each round keeps the best box of every group and drops what it overlaps. torchvision's `nms`
    compares it with the boxes of all groups instead: with those of a batch that takes longer.
    """
    groups, places = groups.sort(stable=True)
    boxes = boxes[places]
    kept = []
    while len(places) and len(kept) < num_rounds:
        is_best = torch.ones_like(groups, dtype=torch.bool)
        is_best[1:] = groups[1:] != groups[:-1]
        kept.append(places[is_best])
        best = boxes[is_best][is_best.cumsum(0) - 1]
        overlap = pairwise_iou(boxes[:, None], best[:, None])[:, 0, 0]
        left = (~is_best & (overlap <= iou_threshold)).nonzero()[:, 0]
        boxes, groups, places = boxes[left], groups[left], places[left]
    return torch.cat(kept) if kept else places


suppress_operator = torch.library.custom_op("detection::suppress", _suppress, mutates_args=())


@suppress_operator.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, visible: Tensor, *_: object) -> Tensor:
    return torch.empty_like(visible)
