"""Precision, recall and scores of each class, at IoU 0.50 unless it says otherwise.

NaN stands where no ground truth defines a number. Shapes: K classes, D detections, R recall points
(0 to 1 in steps of 0.01), S scores (the same steps).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from detection.evaluation.matches import Matches

# linspace and not arange: these are pycocotools' own recall points.
STEPS = np.linspace(0.0, 1.0, 101)


class ScoreCurves(NamedTuple):
    """What is kept when detections below a score are dropped.

    Args:
        precision: (K, S); NaN where nothing is kept.
        recall: (K, S).
        f1: (K, S).
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


class BestF1(NamedTuple):
    """The score of each class at which its F1 is highest: (K,) each; the score is a detection's."""

    f1: np.ndarray
    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


class Calibration(NamedTuple):
    """How often detections of a score are right.

    Args:
        edges: (bins + 1,) of the scores.
        counts: (bins,) detections.
        mean_scores: (bins,).
        precision: (bins,) the share that found a ground truth.
        error: the mean distance of the two, by detections (expected calibration error: Guo et al.,
            "On Calibration of Modern Neural Networks", ICML 2017).
    """

    edges: np.ndarray
    counts: np.ndarray
    mean_scores: np.ndarray
    precision: np.ndarray
    error: float


def trace_precision(matches: Matches, threshold: int = 0) -> np.ndarray:
    """(K, R) interpolated precision by recall at the IoU threshold of that place."""
    curves = []
    for label, num_truths in enumerate(matches.num_truths):
        kept = (matches.labels == label) & ~matches.ignored[threshold]
        curves.append(interpolate_precision(matches.truths[threshold, kept] >= 0, num_truths))
    return np.array(curves).reshape(-1, len(STEPS))


def interpolate_precision(correct: np.ndarray, num_truths: int) -> np.ndarray:
    """(R,) the highest precision at each recall or a higher one, as in COCO's AP.

    Args:
        correct: (D,) bool, best first.
        num_truths: all that could be found; NaN comes back where it is 0.
    """
    if num_truths == 0:
        return np.full(len(STEPS), np.nan)
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(correct) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / num_truths, STEPS, side="left")
    return np.append(envelope, 0.0)[places]


def average_precisions(
    labels: np.ndarray,
    scores: np.ndarray,
    correct: np.ndarray,
    kept: np.ndarray,
    num_truths: np.ndarray,
) -> np.ndarray:
    """(K,) AP of each class at one IoU threshold.

    Args:
        labels: (D,).
        scores: (D,).
        correct: (D,) bool.
        kept: (D,) bool; the others are left out.
        num_truths: (K,).
    """
    order = np.lexsort((-scores, labels))
    order = order[kept[order]]
    bounds = np.searchsorted(labels[order], np.arange(len(num_truths) + 1))
    return np.array(
        [
            interpolate_precision(correct[order[bounds[k] : bounds[k + 1]]], num_truths[k]).mean()
            for k in range(len(num_truths))
        ]
    )


def trace_scores(matches: Matches) -> ScoreCurves:
    """Precision, recall and F1 of each class by score."""
    rows = []
    for label, num_truths in enumerate(matches.num_truths):
        scores, hits = _ranked(matches, label)
        counts = len(scores) - np.searchsorted(scores[::-1], STEPS, side="left")
        rows.append(_rates(np.append(0, hits)[counts], counts, num_truths))
    columns = np.array(rows).reshape(-1, 3, len(STEPS))
    return ScoreCurves(*(columns[:, i] for i in range(3)))


def find_best_f1(matches: Matches) -> BestF1:
    """The score of each class at which its F1 is highest; the highest such score of several."""
    found = []
    for label, num_truths in enumerate(matches.num_truths):
        scores, hits = _ranked(matches, label)
        # Detections of one score are kept or dropped together.
        counts = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)]) + 1
        precision, recall, f1 = _rates(hits[counts - 1], counts, num_truths)
        if num_truths == 0 or not len(counts):
            found.append((0.0 if num_truths else np.nan, np.nan, np.nan, np.nan))
        else:
            best = int(f1.argmax())
            found.append((f1[best], scores[counts[best] - 1], precision[best], recall[best]))
    return BestF1(*np.array(found, np.float64).reshape(-1, 4).T)


def choose_score(curves: ScoreCurves) -> float:
    """The score of the highest mean F1 over the classes that have ground truth; 0 without any."""
    f1 = curves.f1[~np.isnan(curves.f1).any(1)]
    return float(STEPS[f1.mean(0).argmax()]) if len(f1) else 0.0


def calibrate(matches: Matches, num_bins: int = 10) -> Calibration:
    """How often detections are right, in bins of their score; those on crowds are left out."""
    kept = ~matches.ignored[0]
    scores, correct = matches.scores[kept], matches.correct[kept]
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.clip(np.digitize(scores, edges) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_scores = np.bincount(bins, scores, num_bins) / counts
        precision = np.bincount(bins, correct, num_bins) / counts
    gaps = np.abs(mean_scores - precision)[counts > 0]
    error = float(np.average(gaps, weights=counts[counts > 0])) if len(gaps) else np.nan
    return Calibration(edges, counts, mean_scores, precision, error)


def _ranked(matches: Matches, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a class, best first, and how many were right down to each."""
    kept = (matches.labels == label) & ~matches.ignored[0]
    return matches.scores[kept], np.cumsum(matches.correct[kept])


def _rates(
    hits: np.ndarray, counts: np.ndarray, num_truths: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of so many hits among so many detections."""
    if num_truths == 0:
        undefined = np.full(len(counts), np.nan)
        return undefined, undefined, undefined
    precision = np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)
    return precision, hits / num_truths, 2 * hits / (counts + num_truths)
