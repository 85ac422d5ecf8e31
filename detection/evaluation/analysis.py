"""What stands behind the metrics: curves, thresholds, confusions, errors, single images.

Everything is at IoU 0.50 unless it says otherwise; NaN stands where no ground truth defines a
number. Shapes: K classes, I images, R recall points, T IoU thresholds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from detection.evaluation.coco import CocoEvaluator, mean_defined
from detection.evaluation.curves import (
    BestF1,
    Calibration,
    ScoreCurves,
    calibrate,
    choose_score,
    find_best_f1,
    trace_precision,
    trace_scores,
)
from detection.evaluation.errors import Errors, find_errors
from detection.evaluation.matches import Matches, find_pairs, read_matches

# A name, the place of its IoU threshold (None: the mean over all), of its area range, and what of.
CLASS_METRICS = (
    ("AP", None, 0, "precision"),
    ("AP50", 0, 0, "precision"),
    ("AP75", 5, 0, "precision"),
    ("APs", None, 1, "precision"),
    ("APm", None, 2, "precision"),
    ("APl", None, 3, "precision"),
    ("AR100", None, 0, "recall"),
    ("ARs", None, 1, "recall"),
    ("ARm", None, 2, "recall"),
    ("ARl", None, 3, "recall"),
)


class ImageCounts(NamedTuple):
    """(I,) each, with detections below a score dropped."""

    correct: np.ndarray
    false: np.ndarray
    missed: np.ndarray

    @property
    def worst(self) -> np.ndarray:
        """(I,) places of the images, those with most missed and false detections first."""
        return np.argsort(-(self.missed + self.false), kind="stable")


class Analysis(NamedTuple):
    """What `analyze` finds.

    Args:
        matches: which detection found what.
        class_metrics: (K,) each, by the names in `CLASS_METRICS`.
        precision_recall: (K, R) interpolated precision, whose mean is the AP50.
        score_curves: precision, recall and F1 by score.
        best_f1: of each class.
        score: that of the highest mean F1 over the classes; the following are at this score.
        confusion: (K + 1, K + 1), as of `count_confusions`.
        images: counts of each image.
        errors: as TIDE defines them, whatever their score.
        calibration: of the scores.
    """

    matches: Matches
    class_metrics: dict[str, np.ndarray]
    precision_recall: np.ndarray
    score_curves: ScoreCurves
    best_f1: BestF1
    score: float
    confusion: np.ndarray
    images: ImageCounts
    errors: Errors
    calibration: Calibration


def analyze(evaluator: CocoEvaluator, results: list[dict[str, Any]]) -> Analysis:
    """Everything there is to know about `results`, which are in the COCO results format.

    Raises:
        UserError: as `CocoEvaluator.evaluate`.
    """
    evaluation = evaluator.accumulate(results)
    matches = read_matches(evaluator, results, evaluation)
    score_curves = trace_scores(matches)
    score = choose_score(score_curves)
    return Analysis(
        matches=matches,
        class_metrics=read_class_metrics(evaluation),
        precision_recall=trace_precision(matches),
        score_curves=score_curves,
        best_f1=find_best_f1(matches),
        score=score,
        confusion=count_confusions(matches, score),
        images=count_images(matches, score),
        errors=find_errors(matches),
        calibration=calibrate(matches),
    )


def read_class_metrics(evaluation: Any) -> dict[str, np.ndarray]:
    """(K,) of each of `CLASS_METRICS`, from an accumulated COCOeval."""
    found = {}
    for name, threshold, area, key in CLASS_METRICS:
        values = np.moveaxis(evaluation.eval[key][..., area, -1], -1, 0)  # (K, T, ...)
        values = values if threshold is None else values[:, threshold]
        means = np.array([mean_defined(of_class) for of_class in values])
        found[name] = np.where(means < 0, np.nan, means)
    return found


def count_confusions(matches: Matches, score: float) -> np.ndarray:
    """(K + 1, K + 1): true class by detected class, the background last in both.

    The diagonal holds the matches of the metric. What is left over pairs across classes, best
    scores first, with the ground truth of the highest IoU of at least 0.50 that is free.
    """
    background = len(matches.names)
    kept = matches.scores >= score
    correct, wrong = matches.correct & kept, matches.wrong & kept
    free = matches.counted.copy()
    free[matches.truths[0, correct]] = False
    detected = np.full(len(free), background)
    alone = wrong.copy()
    pairs = find_pairs(matches, 0.5)
    order = np.lexsort((-pairs.ious, -matches.scores[pairs.detections]))
    order = order[wrong[pairs.detections[order]] & free[pairs.truths[order]]]
    for detection, truth in zip(pairs.detections[order], pairs.truths[order], strict=True):
        if alone[detection] and free[truth]:
            alone[detection] = free[truth] = False
            detected[truth] = matches.labels[detection]
    detected[matches.truths[0, correct]] = matches.labels[correct]
    table = np.zeros((background + 1, background + 1), np.int64)
    np.add.at(table, (matches.truth_labels[matches.counted], detected[matches.counted]), 1)
    np.add.at(table[background], matches.labels[alone], 1)
    return table


def count_images(matches: Matches, score: float) -> ImageCounts:
    """What was found, invented and missed in each image."""
    num_images = len(matches.image_ids)
    kept = matches.scores >= score
    correct = np.bincount(matches.images[matches.correct & kept], minlength=num_images)
    false = np.bincount(matches.images[matches.wrong & kept], minlength=num_images)
    truths = np.bincount(matches.truth_images[matches.counted], minlength=num_images)
    return ImageCounts(correct=correct, false=false, missed=truths - correct)
