"""COCO metrics, and the analysis of what stands behind them."""

from __future__ import annotations

from detection.evaluation.analysis import Analysis, analyze
from detection.evaluation.coco import (
    METRIC_NAMES,
    CocoEvaluator,
    coco_results,
    evaluate_coco,
    fastest_backend,
    metrics_table,
    write_metrics,
    write_results,
)
from detection.evaluation.comparison import Comparison, compare, comparison_table

__all__ = [
    "METRIC_NAMES",
    "Analysis",
    "CocoEvaluator",
    "Comparison",
    "analyze",
    "coco_results",
    "compare",
    "comparison_table",
    "evaluate_coco",
    "fastest_backend",
    "metrics_table",
    "write_metrics",
    "write_results",
]
