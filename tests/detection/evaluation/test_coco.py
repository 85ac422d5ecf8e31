"""The project's metrics are pycocotools' own, whatever the set looks like."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from detection.errors import UserError
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
from detection.structures import Category

MakeSet = Callable[[int], tuple[dict[str, Any], list[dict[str, Any]]]]
CATEGORIES = (Category(2, "cat"), Category(7, "dog"), Category(40, "never seen"))
COCO128 = Path(__file__).parents[4] / "shared/data/coco128/annotations/instances_val.json"


def annotation(image_id: int, category_id: int, bbox: list[float], **fields: Any) -> dict[str, Any]:
    area = bbox[2] * bbox[3]
    return {
        **{"image_id": image_id, "category_id": category_id, "bbox": bbox},
        **{"area": area, "iscrowd": 0, **fields},
    }


def coco_dict(image_ids: list[int], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 320, "height": 240} for i in image_ids
        ],
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
        "annotations": [{**a, "id": n} for n, a in enumerate(annotations, start=1)],
    }


def random_set(seed: int, num_images: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Gaps in ids, crowds, images without ground truth, misses, duplicates and false positives."""
    rng = np.random.default_rng(seed)
    image_ids = [int(i) for i in rng.choice(1000, num_images, replace=False)]
    annotations, results = [], []
    for image_id in image_ids[1:]:
        for _ in range(rng.integers(0, 12)):
            category_id = CATEGORIES[rng.integers(0, 2)].id
            corner, size = rng.uniform(0, 200, 2), rng.uniform(4, 120, 2)
            annotations.append(
                annotation(
                    image_id,
                    category_id,
                    [*map(float, corner), *map(float, size)],
                    iscrowd=int(rng.random() < 0.15),
                )
            )
            for _ in range(rng.integers(0, 4)):
                corner_xyxy = np.concatenate([corner, corner + size]) + rng.normal(0, 4, 4)
                results += coco_results(
                    torch.tensor(corner_xyxy[None], dtype=torch.float32),
                    torch.tensor([rng.random()], dtype=torch.float32),
                    torch.tensor([rng.integers(0, 3)]),
                    image_id,
                    CATEGORIES,
                )
    return coco_dict(image_ids, annotations), results


def as_results(ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for a in ground_truth["annotations"]
        if not a["iscrowd"]
    ]


def test_results_hold_original_ids_and_xywh() -> None:
    results = coco_results(
        torch.tensor([[1.5, 2.0, 11.5, 22.25], [0.0, 0.0, 1.0, 1.0]]),
        torch.tensor([0.5, 0.25]),
        torch.tensor([1, 0]),
        9,
        CATEGORIES,
    )
    assert results == [
        {"image_id": 9, "category_id": 7, "bbox": [1.5, 2.0, 10.0, 20.25], "score": 0.5},
        {"image_id": 9, "category_id": 2, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.25},
    ]
    assert (
        coco_results(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 9, CATEGORIES) == []
    )


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_pycocotools_on_the_written_files(seed: int, tmp_path: Path) -> None:
    ground_truth, results = random_set(seed)
    metrics = evaluate_coco(ground_truth, results)
    write_results(results, tmp_path / "run" / "detections.json")
    (tmp_path / "annotations.json").write_text(json.dumps(ground_truth))

    reference = COCO(str(tmp_path / "annotations.json"))
    evaluation = COCOeval(
        reference, reference.loadRes(str(tmp_path / "run" / "detections.json")), "bbox"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert [metrics[name] for name in METRIC_NAMES] == evaluation.stats.tolist()
    assert 0 < metrics["AP"] < 1

    for category in CATEGORIES[:2]:
        evaluation.params.catIds = [category.id]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        numbers = metrics["per_class"][category.name]
        expected = [
            evaluation.stats[METRIC_NAMES.index(n)] for n in ("AP", "AP50", "AP75", "AR100")
        ]
        assert [numbers[n] for n in ("AP", "AP50", "AP75", "AR100")] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_ground_truth_as_detections_is_perfect(seed: int) -> None:
    ground_truth, _ = random_set(seed)
    assert any(a["iscrowd"] for a in ground_truth["annotations"])
    metrics = evaluate_coco(ground_truth, as_results(ground_truth))
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["AR100"] == 1.0


def test_ground_truth_of_a_real_set_is_perfect() -> None:
    if not COCO128.exists():
        pytest.skip("the coco128 set is not beside this checkout")
    ground_truth = json.loads(COCO128.read_text())
    metrics = evaluate_coco(ground_truth, as_results(ground_truth))
    assert metrics["AP"] == pytest.approx(1.0)
    assert len(metrics["per_class"]) == 80


def test_classes_average_to_the_whole() -> None:
    metrics = evaluate_coco(*random_set(5))
    for name in ("AP", "AP50", "AP75", "AR100"):
        of_classes = [n[name] for n in metrics["per_class"].values() if n["num_boxes"]]
        assert np.mean(of_classes) == pytest.approx(metrics[name], abs=1e-12)


def test_no_detections_gives_zeros_and_minus_one_where_undefined() -> None:
    ground_truth = coco_dict([3, 8], [annotation(3, 2, [10.0, 10.0, 20.0, 20.0])])
    metrics = evaluate_coco(ground_truth, [])
    defined = {name: metrics[name] for name in METRIC_NAMES if metrics[name] != -1}
    assert defined == dict.fromkeys(("AP", "AP50", "AP75", "APs", *METRIC_NAMES[6:10]), 0.0)
    assert metrics["per_class"] == {
        "cat": {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "AR100": 0.0, "num_boxes": 1},
        "dog": {"AP": -1.0, "AP50": -1.0, "AP75": -1.0, "AR100": -1.0, "num_boxes": 0},
        "never seen": {"AP": -1.0, "AP50": -1.0, "AP75": -1.0, "AR100": -1.0, "num_boxes": 0},
    }


@pytest.mark.parametrize("image_ids", [[], [4, 9]])
def test_no_ground_truth_is_undefined(image_ids: list[int]) -> None:
    ground_truth = coco_dict(image_ids, [])
    results = [{**annotation(i, 2, [1.0, 1.0, 9.0, 9.0]), "score": 0.9} for i in image_ids]
    for of_results in ([], results):
        metrics = evaluate_coco(ground_truth, of_results)
        assert {metrics[name] for name in METRIC_NAMES} == {-1.0}


def test_a_detection_on_a_crowd_is_no_false_positive() -> None:
    dog = annotation(1, 7, [0.0, 0.0, 50.0, 50.0])
    herd = annotation(1, 7, [100.0, 100.0, 100.0, 100.0], iscrowd=1)
    results = [
        {"image_id": 1, "category_id": 7, "bbox": [120.0, 120.0, 30.0, 30.0], "score": 0.9},
        {"image_id": 1, "category_id": 7, "bbox": [0.0, 0.0, 50.0, 50.0], "score": 0.8},
    ]
    with_crowd = evaluate_coco(coco_dict([1], [dog, herd]), results)
    without = evaluate_coco(coco_dict([1], [dog]), results)
    assert with_crowd["AP"] == pytest.approx(1.0)
    assert without["AP"] == pytest.approx(0.5)
    assert with_crowd["per_class"]["dog"]["num_boxes"] == 1


def test_only_the_given_images_count() -> None:
    ground_truth, results = random_set(1)
    kept = ground_truth["images"][:6]
    ids = {image["id"] for image in kept}
    subset = coco_dict(
        sorted(ids), [a for a in ground_truth["annotations"] if a["image_id"] in ids]
    )
    of_subset = [r for r in results if r["image_id"] in ids]
    assert evaluate_coco(subset, of_subset) != evaluate_coco(ground_truth, results)
    with pytest.raises(UserError, match="image_id"):
        evaluate_coco(subset, results)


def test_one_evaluator_serves_many_results_and_changes_none() -> None:
    ground_truth, results = random_set(2)
    before = copy.deepcopy((ground_truth, results))
    evaluator = CocoEvaluator(ground_truth)
    first = evaluator.evaluate(results)
    assert evaluator.evaluate(results[: len(results) // 2]) != first
    assert evaluator.evaluate(results) == first
    assert (ground_truth, results) == before


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("image_id", 5, "image_id"),
        ("category_id", 1, "category_id"),
        ("score", float("nan"), "not finite"),
        ("bbox", [0.0, 0.0, float("inf"), 1.0], "not finite"),
    ],
)
def test_broken_results_are_named(field: str, value: Any, word: str) -> None:
    result = {"image_id": 1, "category_id": 2, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 0.5}
    with pytest.raises(UserError, match=word):
        evaluate_coco(coco_dict([1], []), [{**result, field: value}])


def test_categories_of_one_name_are_all_reported() -> None:
    ground_truth = coco_dict([1], [annotation(1, 2, [0.0, 0.0, 9.0, 9.0])])
    ground_truth["categories"][1]["name"] = "cat"
    metrics = evaluate_coco(ground_truth, [])
    assert list(metrics["per_class"]) == ["cat (2)", "cat (7)", "never seen"]


def test_files_are_plain_json_and_whole(tmp_path: Path) -> None:
    metrics = evaluate_coco(*random_set(3))
    path = tmp_path / "new" / "metrics.json"
    write_metrics(metrics, path)
    assert json.loads(path.read_text()) == metrics
    with pytest.raises(ValueError, match="JSON compliant"):
        write_metrics({"AP": float("nan")}, path)
    assert json.loads(path.read_text()) == metrics
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_coco(*random_set(4))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [80, 200])
def test_table_shows_every_number(width: int) -> None:
    per_class = {
        f"class [/] {k:02d}": {
            "AP": k / 100,
            "AP50": -1.0,
            "AP75": 0.5,
            "AR100": 0.25,
            "num_boxes": k,
        }
        for k in range(80)
    }
    values = {name: 0.1 + i / 1000 for i, name in enumerate(METRIC_NAMES)}
    console = Console(width=width, record=True, file=StringIO())
    console.print(metrics_table({**values, "per_class": per_class}))
    text = console.export_text()
    for name, value in values.items():
        assert name in text
        assert f"{value:.3f}" in text
    places = [text.index(name) for name in per_class]
    assert len(places) == 80
    assert "-1.000" not in text
    assert "–" in text


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_fast_backend_gives_the_numbers_of_the_reference(
    make_hard_set: MakeSet, seed: int
) -> None:
    pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    ground_truth, results = make_hard_set(seed)
    expected = CocoEvaluator(ground_truth).evaluate(results)
    found = CocoEvaluator(ground_truth, backend="hotcoco").evaluate(results)
    for name in METRIC_NAMES:
        assert found[name] == pytest.approx(expected[name], abs=1e-9, rel=0), name
    assert list(found["per_class"]) == list(expected["per_class"])
    for name, numbers in expected["per_class"].items():
        assert found["per_class"][name] == pytest.approx(numbers, abs=1e-9, rel=0), name


def test_hard_sets_hold_what_they_promise(make_hard_set: MakeSet) -> None:
    sets = [make_hard_set(seed) for seed in range(12)]
    annotations = [a for ground_truth, _ in sets for a in ground_truth["annotations"]]
    assert {0, 1} == {a["iscrowd"] for a in annotations}
    assert {1024.0, 9216.0} <= {a["area"] for a in annotations}
    assert any(
        {i["id"] for i in ground_truth["images"]}
        - {a["image_id"] for a in ground_truth["annotations"]}
        for ground_truth, _ in sets
    )
    counts = Counter(
        (n, r["image_id"], r["category_id"]) for n, (_, rs) in enumerate(sets) for r in rs
    )
    assert max(counts.values()) > 100
    assert 0.01 < np.mean([evaluate_coco(*one)["AP"] for one in sets if one[1]]) < 0.99


def test_backends_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="backend=coco: give pycocotools or hotcoco"):
        CocoEvaluator(coco_dict([], []), backend="coco")
    monkeypatch.setattr("detection.evaluation.coco.find_spec", lambda name: None)
    assert fastest_backend() == "pycocotools"
    with pytest.raises(UserError, match="pip install hotcoco"):
        CocoEvaluator(coco_dict([], []), backend="hotcoco")
