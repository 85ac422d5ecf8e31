"""Which detection found which ground truth, as flat columns.

Shapes: D detections, G ground truths, T IoU thresholds (0.50 to 0.95), K classes, P pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask

from detection.evaluation.coco import CocoEvaluator


class Matches(NamedTuple):
    """Detections and ground truths of a split, matched within their class as COCO does.

    Detections come class by class, best first, in the order in which pycocotools ranks them; those
    of an image and class beyond the 100 best are left out, as in its metrics. Labels are places in
    `names`, images places in `image_ids`.

    Args:
        names: of the classes, by category id.
        image_ids: sorted.
        images: (D,).
        labels: (D,).
        scores: (D,).
        boxes_xywh: (D, 4).
        truths: (T, D) the ground truth that each found, or -1.
        ignored: (T, D) detections on crowds, which count neither as right nor as wrong.
        truth_images: (G,) in the order of the annotations.
        truth_labels: (G,).
        truth_boxes_xywh: (G, 4).
        counted: (G,) False for crowds, which nobody has to find.
    """

    names: list[str]
    image_ids: list[int]
    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes_xywh: np.ndarray
    truths: np.ndarray
    ignored: np.ndarray
    truth_images: np.ndarray
    truth_labels: np.ndarray
    truth_boxes_xywh: np.ndarray
    counted: np.ndarray

    @property
    def num_truths(self) -> np.ndarray:
        """(K,) ground truths that count."""
        return np.bincount(self.truth_labels[self.counted], minlength=len(self.names))

    @property
    def correct(self) -> np.ndarray:
        """(D,) whether a detection found a ground truth that counts, at IoU 0.50."""
        return (self.truths[0] >= 0) & ~self.ignored[0]

    @property
    def wrong(self) -> np.ndarray:
        """(D,) whether a detection found none, at IoU 0.50."""
        return (self.truths[0] < 0) & ~self.ignored[0]


class Pairs(NamedTuple):
    """Detections and counted ground truths of the same image that overlap, of whatever classes.

    Args:
        detections: (P,).
        truths: (P,).
        ious: (P,).
    """

    detections: np.ndarray
    truths: np.ndarray
    ious: np.ndarray


def read_matches(
    evaluator: CocoEvaluator, results: list[dict[str, Any]], evaluation: Any
) -> Matches:
    """The matches of `evaluation`, which is `evaluator.accumulate(results)`."""
    annotations = evaluator.ground_truth["annotations"]
    truth_places = {a["id"]: place for place, a in enumerate(annotations)}
    image_places = {own: place for place, own in enumerate(evaluator.image_ids)}
    label_of = {category["id"]: label for label, category in enumerate(evaluator.categories)}

    kept: list[int] = []
    truths: list[list[list[float]]] = [[] for _ in range(10)]
    ignored: list[list[list[bool]]] = [[] for _ in range(10)]
    counted = np.array([not a["iscrowd"] for a in annotations], bool)
    for cell in evaluation.evalImgs:
        if cell is None or list(cell["aRng"]) != [0, 1e10]:  # the range of all areas
            continue
        kept += [number - 1 for number in cell["dtIds"]]
        for t in range(10):
            truths[t].append(cell["dtMatches"][t])
            ignored[t].append(cell["dtIgnore"][t])
        for own, ignore in zip(cell["gtIds"], cell["gtIgnore"], strict=True):
            counted[truth_places[own]] = not ignore

    places = np.array(kept, np.int64)
    labels = np.array([label_of[results[place]["category_id"]] for place in kept], np.int64)
    scores = np.array([results[place]["score"] for place in kept], np.float64)
    order = np.lexsort((-scores, labels))
    ids = np.array([np.concatenate(rows) if rows else [] for rows in truths], np.int64)
    matched = np.array([truth_places[own] if own else -1 for own in ids.ravel().tolist()], np.int64)
    flags = np.array([np.concatenate(rows) if rows else [] for rows in ignored], bool)
    return Matches(
        names=evaluator.names,
        image_ids=evaluator.image_ids,
        images=np.array([image_places[results[p]["image_id"]] for p in places[order]], np.int64),
        labels=labels[order],
        scores=scores[order],
        boxes_xywh=_boxes([results[place]["bbox"] for place in places[order]]),
        truths=matched.reshape(10, -1)[:, order],
        ignored=flags.reshape(10, -1)[:, order],
        truth_images=np.array([image_places[a["image_id"]] for a in annotations], np.int64),
        truth_labels=np.array([label_of[a["category_id"]] for a in annotations], np.int64),
        truth_boxes_xywh=_boxes([a["bbox"] for a in annotations]),
        counted=counted,
    )


def find_pairs(matches: Matches, min_iou: float) -> Pairs:
    """All pairs of an IoU of at least `min_iou`."""
    num_images = len(matches.image_ids)
    of_image = np.argsort(matches.images, kind="stable")
    bounds = np.searchsorted(matches.images[of_image], np.arange(num_images + 1))
    counted = np.flatnonzero(matches.counted)
    truths = counted[np.argsort(matches.truth_images[counted], kind="stable")]
    truth_bounds = np.searchsorted(matches.truth_images[truths], np.arange(num_images + 1))
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for i in range(num_images):
        own = of_image[bounds[i] : bounds[i + 1]]
        own_truths = truths[truth_bounds[i] : truth_bounds[i + 1]]
        if len(own) and len(own_truths):
            ious: Any = mask.iou(
                matches.boxes_xywh[own], matches.truth_boxes_xywh[own_truths], [0] * len(own_truths)
            )
            rows, cols = np.nonzero(ious >= min_iou)
            columns.append((own[rows], own_truths[cols], ious[rows, cols]))
    if not columns:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Pairs(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _boxes(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(-1, 4)
