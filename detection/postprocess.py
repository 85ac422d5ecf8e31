"""From raw predictions to detections. B images, A anchors, S class slots, D detections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from detection.boxes import box_area, clip_boxes, decode_boxes
from detection.structures import Detections, RawPredictions


class Postprocess(nn.Module):
    """Decode, suppress and rank: the best detections of every image at once.

    Suppression is greedy and by class, on boxes that are not yet clipped, as the TensorFlow Object
    Detection API does it. It sees the `num_candidates` best (anchor, class) pairs of an image.
    What survives among them is exactly what would survive among all, as only better boxes
    suppress; so the result is the exact one wherever `max_detections` of them survive.

    Args:
        score_threshold: only scores above it are detections.
        iou_threshold: of two boxes of a class that overlap by more, the worse goes.
        num_candidates: k, at most all pairs.
        max_detections: D.
    """

    def __init__(
        self,
        *,
        score_threshold: float = 1e-8,
        iou_threshold: float = 0.6,
        num_candidates: int = 1000,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.num_candidates = num_candidates
        self.max_detections = max_detections

    @torch.no_grad()
    def forward(self, predictions: RawPredictions, input_size: int) -> Detections:
        """Detections in pixels of the square input; slot 0 of the logits is dropped."""
        logits = predictions.logits[..., 1:].float()
        batch, _, num_classes = logits.shape
        scores = logits.sigmoid().flatten(1)
        scores, pairs = scores.topk(min(self.num_candidates, scores.shape[1]), dim=1)
        anchors, labels = pairs // num_classes, pairs % num_classes

        deltas = predictions.deltas.float().gather(1, anchors[..., None].expand(-1, -1, 4))
        boxes = decode_boxes(deltas, predictions.anchors[anchors])
        images = torch.arange(batch, device=labels.device)[:, None]
        survives = _suppress(boxes, scores, images * num_classes + labels, self.iou_threshold)

        boxes = clip_boxes(boxes, input_size, input_size)
        valid = survives & (scores > self.score_threshold) & (box_area(boxes) > 0)
        ranked = scores.masked_fill(~valid, -1.0)
        ranked, order = ranked.topk(min(self.max_detections, ranked.shape[1]), dim=1)
        valid = ranked > 0
        return Detections(
            boxes=boxes.gather(1, order[..., None].expand(-1, -1, 4)) * valid[..., None],
            scores=ranked.clamp(min=0),
            labels=labels.gather(1, order) * valid,
            valid=valid,
        )


def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy suppression within groups: (B, N, 4), (B, N), (B, N) -> (B, N) bool, True to keep.

    One call for all images and classes: each group is moved to a place of its own. In float64,
    as the distance would cost float32 its fractions of a pixel.
    """
    span = boxes.max() - boxes.min() + 1 if boxes.numel() else boxes.new_ones(())
    moved = boxes.double() + (groups * span.double())[..., None]
    kept = nms(moved.flatten(0, 1), scores.flatten().double(), iou_threshold)
    return (
        torch.zeros_like(scores, dtype=torch.bool)
        .view(-1)
        .index_fill(0, kept, True)
        .view_as(scores)
    )
