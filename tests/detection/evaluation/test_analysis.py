from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from detection.evaluation.analysis import analyze, count_confusions, count_images
from detection.evaluation.coco import CocoEvaluator

MakeSet = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


TRUTHS = [(1, "a", 0, 100), (1, "b", 200, 100), (1, "a", 400, 100), (2, "b", 0, 100)]
RESULTS = [
    (1, "a", 0, 100, 0.9),  # right
    (1, "a", 200, 100, 0.8),  # on a b
    (1, "b", 200, 100, 0.3),  # right, if low scores count
    (1, "a", 700, 100, 0.7),  # on nothing
    (1, "a", 5, 100, 0.6),  # a duplicate
]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.5, [[1, 0, 1], [1, 0, 1], [2, 0, 0]]),
        (0.1, [[1, 0, 1], [0, 1, 1], [3, 0, 0]]),
        (0.95, [[0, 0, 2], [0, 0, 2], [0, 0, 0]]),
    ],
)
def test_confusions_by_hand(make_set: MakeSet, score: float, expected: list[list[int]]) -> None:
    found = analyze(CocoEvaluator((s := make_set(TRUTHS, RESULTS))[0]), s[1])
    assert count_confusions(found.matches, score).tolist() == expected


def test_image_counts_by_hand(make_set: MakeSet) -> None:
    found = analyze(CocoEvaluator((s := make_set(TRUTHS, RESULTS))[0]), s[1])
    counts = count_images(found.matches, 0.5)
    assert [column.tolist() for column in counts] == [[1, 0], [3, 0], [2, 1]]
    assert counts.worst.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(6))
def test_everything_adds_up(make_hard_set: MakeSet, seed: int) -> None:
    ground_truth, results = make_hard_set(seed)
    found = analyze(CocoEvaluator(ground_truth), results)
    matches, counts = found.matches, found.images
    kept = matches.scores >= found.score
    assert found.confusion[:-1].sum(1).tolist() == matches.num_truths.tolist()
    assert found.confusion[:, :-1].sum() == (kept & ~matches.ignored[0]).sum()
    assert np.trace(found.confusion) == counts.correct.sum() == (kept & matches.correct).sum()
    assert (counts.correct + counts.missed).sum() == matches.num_truths.sum()
    place = round(found.score * 100)
    recall = found.score_curves.recall[:, place]
    assert np.nansum(recall * matches.num_truths) == pytest.approx(counts.correct.sum())


def test_more_than_a_hundred_are_left_out(make_set: MakeSet) -> None:
    results = [(1, "a", 300 + i, 50, 0.5 + i / 1000) for i in range(120)]
    found = analyze(CocoEvaluator((s := make_set([(1, "a", 0, 100)], results))[0]), s[1])
    assert len(found.matches.scores) == 100
    assert found.matches.scores.min() == pytest.approx(0.52)


def test_nothing_at_all(make_set: MakeSet) -> None:
    ground_truth, _ = make_set([], [])
    ground_truth["images"] = []
    found = analyze(CocoEvaluator(ground_truth), [])
    assert found.score == 0.0 and found.confusion.tolist() == [[0] * 3] * 3
    assert found.precision_recall.shape == (2, 101)
