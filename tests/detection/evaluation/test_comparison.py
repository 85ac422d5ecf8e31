from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console

from detection.evaluation.analysis import analyze
from detection.evaluation.coco import CocoEvaluator
from detection.evaluation.comparison import compare, comparison_table

MakeSet = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


def test_two_detectors_by_hand(make_set: MakeSet) -> None:
    """The first finds image 1's, the second image 2's and invents one more."""
    truths = [(1, "a", 0, 100), (2, "a", 0, 100)]
    first = [(1, "a", 0, 100, 0.9)]
    second = [(2, "a", 0, 100, 0.8), (2, "a", 500, 100, 0.85)]
    evaluator = CocoEvaluator(make_set(truths, [])[0])
    analyses = [analyze(evaluator, make_set(truths, results)[1]) for results in (first, second)]
    found = compare(*analyses)
    assert found.only_first.tolist() == [1, 0]
    assert found.only_second.tolist() == [0, 1]
    assert found.false_difference.tolist() == [0, 1]
    assert found.most_different.tolist() == [1, 0]
    difference = found.class_differences["AP50"]
    expected = [a.class_metrics["AP50"][0] for a in analyses]
    assert difference[0] == expected[1] - expected[0] < 0
    assert np.isnan(difference[1])
    console = Console(record=True, file=StringIO())
    console.print(comparison_table(found))
    text = console.export_text()
    assert f"{difference[0]:+.3f}" in text and "–" in text


def test_a_detector_does_not_differ_from_itself(make_hard_set: MakeSet) -> None:
    ground_truth, results = make_hard_set(2)
    one = analyze(CocoEvaluator(ground_truth), results)
    found = compare(one, one)
    assert not found.only_first.any() and not found.false_difference.any()
    assert np.nanmax(np.abs(found.class_differences["AP"])) == 0
