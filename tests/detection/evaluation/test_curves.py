from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from detection.evaluation.analysis import analyze, read_class_metrics
from detection.evaluation.coco import CocoEvaluator
from detection.evaluation.curves import STEPS, calibrate, interpolate_precision, trace_precision
from detection.evaluation.matches import read_matches

MakeSet = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize("seed", range(4))
def test_the_curves_are_those_of_pycocotools(
    make_hard_set: MakeSet, backend: str, seed: int
) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    ground_truth, results = make_hard_set(seed)
    evaluator = CocoEvaluator(ground_truth, backend=backend)
    evaluation = evaluator.accumulate(results)
    matches = read_matches(evaluator, results, evaluation)
    for t in range(10):
        expected = evaluation.eval["precision"][t, :, :, 0, -1].T  # (K, R)
        found = np.nan_to_num(trace_precision(matches, t), nan=-1.0)
        np.testing.assert_allclose(found, expected, atol=1e-9)
    metrics = evaluator.evaluate(results)
    for name in ("AP", "AP50", "AP75", "AR100"):
        by_class = [metrics["per_class"][own][name] for own in matches.names]
        found = np.nan_to_num(read_class_metrics(evaluation)[name], nan=-1.0)
        np.testing.assert_allclose(found, by_class, atol=1e-12)


def test_sizes_average_to_the_metrics(make_hard_set: MakeSet) -> None:
    for seed in range(4):
        evaluator = CocoEvaluator((ground_truth := make_hard_set(seed))[0])
        metrics = evaluator.evaluate(ground_truth[1])
        found = read_class_metrics(evaluator.accumulate(ground_truth[1]))
        for name in ("APs", "APm", "APl", "ARs", "ARm", "ARl"):
            defined = found[name][~np.isnan(found[name])]
            mean = defined.mean() if len(defined) else -1.0
            assert metrics[name] == pytest.approx(mean, abs=1e-12), name


@pytest.mark.parametrize(
    ("correct", "num_truths", "ap"),
    [
        ([], 2, 0.0),
        ([True, True], 2, 1.0),
        ([True], 2, 51 / 101),  # full precision up to recall 0.50
        ([False, True], 1, 0.5),
        ([True, False, True], 2, (51 + 50 * 2 / 3) / 101),
    ],
)
def test_average_precision_by_hand(correct: list[bool], num_truths: int, ap: float) -> None:
    curve = interpolate_precision(np.array(correct, bool), num_truths)
    assert curve.mean() == pytest.approx(ap)
    assert np.isnan(interpolate_precision(np.array(correct, bool), 0)).all()


def test_the_best_score_by_hand(make_set: MakeSet) -> None:
    """Two of three found before the first false one; the score of the tie counts as a whole."""
    truths = [(1, "a", 0, 100), (1, "a", 200, 100), (2, "a", 0, 100)]
    results = [
        (1, "a", 0, 100, 0.9),
        (1, "a", 200, 100, 0.6),
        (2, "a", 500, 100, 0.4),
        (2, "a", 0, 100, 0.4),
        (2, "a", 700, 100, 0.2),
    ]
    found = analyze(CocoEvaluator((s := make_set(truths, results))[0]), s[1])
    # 3 of 3 with one false (F1 6/7) beats 2 of 3 with none (F1 4/5).
    assert [column[0] for column in found.best_f1] == pytest.approx([6 / 7, 0.4, 0.75, 1.0])
    assert np.isnan([column[1] for column in found.best_f1]).all()
    curves = found.score_curves
    places = [0, 30, 50, 70, 95]
    assert STEPS[places].tolist() == pytest.approx([0.0, 0.3, 0.5, 0.7, 0.95])
    assert curves.recall[0, places].tolist() == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    precision = curves.precision[0, places].tolist()
    assert precision == pytest.approx([0.6, 0.75, 1, 1, np.nan], nan_ok=True)
    assert 0.2 < found.score <= 0.4


def test_a_class_without_detections_has_an_f1_of_zero(make_set: MakeSet) -> None:
    found = analyze(CocoEvaluator((s := make_set([(1, "a", 0, 100)], []))[0]), s[1])
    assert found.best_f1.f1[0] == 0.0 and np.isnan(found.best_f1.scores[0])
    assert (found.score_curves.f1[0] == 0).all()


def test_calibration_by_hand(make_set: MakeSet) -> None:
    truths = [(1, "a", 0, 100), (1, "a", 200, 100), (2, "b", 0, 300, True)]
    results = [
        (1, "a", 0, 100, 0.95),
        (1, "a", 200, 100, 0.42),
        (1, "a", 600, 100, 0.46),
        (2, "b", 0, 100, 0.91),  # on a crowd: left out
        (1, "a", 800, 100, 1.0),
    ]
    found = analyze(CocoEvaluator((s := make_set(truths, results))[0]), s[1])
    calibration = calibrate(found.matches)
    assert calibration.counts.tolist() == [0, 0, 0, 0, 2, 0, 0, 0, 0, 2]
    assert calibration.mean_scores[[4, 9]].tolist() == pytest.approx([0.44, 0.975])
    assert calibration.precision[[4, 9]].tolist() == [0.5, 0.5]
    assert calibration.error == pytest.approx((0.06 + 0.475) / 2)
    empty = analyze(CocoEvaluator((s := make_set(truths, []))[0]), s[1])
    assert np.isnan(empty.calibration.error)
