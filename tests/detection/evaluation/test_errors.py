"""Errors sorted by kind, against cases worked out by hand and the definitions in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from detection.evaluation.analysis import Analysis, analyze
from detection.evaluation.coco import CocoEvaluator
from detection.evaluation.errors import KINDS

MakeSet = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


def analyze_set(made: tuple[dict[str, Any], list[dict[str, Any]]]) -> Analysis:
    return analyze(CocoEvaluator(made[0]), made[1])


def names_of(analysis: Analysis) -> list[str | None]:
    """The kind of each detection, best score first."""
    order = np.argsort(-analysis.matches.scores)
    return [KINDS[kind] if kind >= 0 else None for kind in analysis.errors.kinds[order]]


# One ground truth of class a at 0 to 100 in image 1, and one of class b at 400 to 500.
CASES = [
    ("right", (1, "a", 0, 100), None),
    ("shifted by a half: IoU 1/3", (1, "a", 50, 100), "localization"),
    ("shifted far: IoU 1/19", (1, "a", 90, 100), "background"),
    ("nothing there", (1, "a", 700, 100), "background"),
    ("in the other image", (2, "a", 0, 100), "background"),
    ("of another class", (1, "b", 0, 100), "classification"),
    ("of another class and shifted", (1, "b", 50, 100), "both"),
]


@pytest.mark.parametrize(("name", "box", "kind"), CASES, ids=[case[0] for case in CASES])
def test_a_single_detection(make_set: MakeSet, name: str, box: tuple, kind: str | None) -> None:
    truths = [(1, "a", 0, 100), (1, "b", 400, 100)]
    found = analyze_set(make_set(truths, [(*box, 0.9)]))
    assert names_of(found) == [kind]
    assert found.errors.counts.sum() == (kind is not None) + found.errors.missed.sum()
    # Ground truth that a better box or another class would have found is not missed.
    found_or_near = kind in (None, "localization", "classification")
    assert found.errors.missed.tolist() == [not found_or_near, True]


def test_duplicates_and_crowds(make_set: MakeSet) -> None:
    truths = [(1, "a", 0, 100), (1, "a", 400, 200, True)]
    results = [(1, "a", 0, 100, 0.9), (1, "a", 5, 100, 0.8), (1, "a", 450, 50, 0.7)]
    found = analyze_set(make_set(truths, results))
    assert names_of(found) == [None, "duplicate", None]
    assert found.matches.ignored[0].tolist() == [False, False, True]
    assert found.errors.missed.tolist() == [False, False]


def test_what_each_kind_costs(make_set: MakeSet) -> None:
    """Of class a, one of two is found, after a false one, and one has a poor box."""
    truths = [(1, "a", 0, 100), (2, "a", 0, 100), (2, "b", 400, 100)]
    results = [
        (1, "a", 700, 100, 0.9),
        (1, "a", 0, 100, 0.8),
        (2, "a", 50, 100, 0.7),
        (2, "a", 60, 100, 0.6),
    ]
    found = analyze_set(make_set(truths, results))
    now = 0.5 * 51 / 101
    assert found.class_metrics["AP50"] == pytest.approx([now, 0.0])
    assert found.errors.counts.tolist() == [[0, 0], [2, 0], [0, 0], [0, 0], [1, 0], [0, 1]]
    costs = dict(zip(KINDS, found.errors.costs, strict=True))
    # Without the false one: precision 1 up to recall 0.5. With the best of the poor boxes right and
    # the other gone: 2 of 3 right at full recall. Class b leaves the mean when nothing is missed.
    assert costs == pytest.approx(
        {
            "classification": 0.0,
            "localization": (2 / 3 - now) / 2,
            "both": 0.0,
            "duplicate": 0.0,
            "background": (51 / 101 - now) / 2,
            "missed": now - now / 2,
        }
    )
    kind = KINDS.index("background")
    assert found.errors.class_costs[kind] == pytest.approx([51 / 101 - now, 0.0])


def test_a_poor_box_on_what_is_found_is_only_left_out(make_set: MakeSet) -> None:
    truths = [(1, "a", 0, 100), (2, "a", 0, 100)]
    found = analyze_set(make_set(truths, [(1, "a", 0, 100, 0.9), (1, "a", 50, 100, 0.8)]))
    assert names_of(found) == [None, "localization"]
    assert found.errors.costs[KINDS.index("localization")] == pytest.approx(0.0)
    assert found.errors.missed.tolist() == [False, True]


def test_a_classification_error_is_mended_in_the_class_of_its_truth(make_set: MakeSet) -> None:
    truths = [(1, "a", 0, 100), (2, "b", 0, 100)]
    results = [(1, "b", 0, 100, 0.9), (2, "b", 0, 100, 0.8)]
    found = analyze_set(make_set(truths, results))
    assert found.class_metrics["AP50"] == pytest.approx([0.0, 0.5])
    kind = KINDS.index("classification")
    assert found.errors.class_costs[kind] == pytest.approx([1.0, 0.5])
    assert found.errors.costs[kind] == pytest.approx(0.75)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    corners = [np.concatenate([box[:2], box[:2] + box[2:]]) for box in (one, other)]
    low, high = np.maximum(*corners)[:2], np.minimum(*corners)[2:]
    shared = np.prod(np.maximum(high - low, 0))
    whole = np.prod(one[2:]) + np.prod(other[2:]) - shared
    return float(shared / whole) if whole else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_the_kinds_are_those_of_the_definitions(make_hard_set: MakeSet, seed: int) -> None:
    found = analyze_set(make_hard_set(seed))
    matches, errors = found.matches, found.errors
    taken = set(matches.truths[0, matches.correct].tolist())
    near = set()
    for d in range(len(matches.labels)):
        overlaps = {
            g: iou(matches.boxes_xywh[d], matches.truth_boxes_xywh[g])
            for g in np.flatnonzero(matches.counted & (matches.truth_images == matches.images[d]))
        }
        own = {g: v for g, v in overlaps.items() if matches.truth_labels[g] == matches.labels[d]}
        other = {g: v for g, v in overlaps.items() if g not in own}
        if not matches.wrong[d]:
            expected = None
        elif 0.1 <= max(own.values(), default=0) <= 0.5:
            expected = "localization"
            near |= {g for g, v in own.items() if v == max(own.values())}
        elif max(other.values(), default=0) >= 0.5:
            expected = "classification"
            near |= {g for g, v in other.items() if v == max(other.values())}
        elif any(v >= 0.5 for g, v in own.items() if g in taken):
            expected = "duplicate"
        elif max(overlaps.values(), default=0) <= 0.1:
            expected = "background"
        else:
            expected = "both"
        assert (KINDS[errors.kinds[d]] if errors.kinds[d] >= 0 else None) == expected, d
    unfound = {g for g in np.flatnonzero(matches.counted) if g not in taken}
    # Of several equally near ground truths, one is meant.
    assert unfound - near <= set(np.flatnonzero(errors.missed).tolist()) <= unfound


def test_nothing_at_all(make_set: MakeSet) -> None:
    found = analyze_set(make_set([], []))
    assert found.errors.counts.sum() == 0
    assert np.isnan(found.errors.class_costs).all()
