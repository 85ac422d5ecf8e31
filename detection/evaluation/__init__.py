"""COCO metrics: from detections to the twelve numbers and those of each class."""

from __future__ import annotations

from detection.evaluation.coco import (
    METRIC_NAMES,
    CocoEvaluator,
    coco_results,
    evaluate_coco,
    metrics_table,
    write_metrics,
    write_results,
)

__all__ = [
    "METRIC_NAMES",
    "CocoEvaluator",
    "coco_results",
    "evaluate_coco",
    "metrics_table",
    "write_metrics",
    "write_results",
]
