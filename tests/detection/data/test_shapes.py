from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.data.coco import CocoIndex
from detection.data.shapes import CLASSES, Recipe, draw_image, provide
from detection.errors import UserError

RECIPE = Recipe(num_train=6, num_val=3)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provide(RECIPE, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Any, list[dict[str, Any]]]]:
    return [draw_image(np.random.default_rng([1, i]), Recipe()) for i in range(120)]


def test_set_reads_as_coco(folder: Path):
    for split, num_images in (("train", 6), ("val", 3)):
        index = CocoIndex.load(
            images=folder / "images" / split,
            annotations=folder / "annotations" / f"instances_{split}.json",
        )
        assert len(index) == num_images and index.describe() == []
        assert [category.name for category in index.categories] == list(CLASSES)
        for i in range(num_images):
            index.load_image(i)


def test_set_is_the_same_everywhere_and_drawn_once(folder: Path, tmp_path: Path):
    files = read_files(folder)
    again = provide(RECIPE, tmp_path)
    assert read_files(again) == files
    stamp = os.stat(again / "images" / "val" / "00001.jpg").st_mtime_ns
    assert provide(RECIPE, tmp_path) == again
    assert os.stat(again / "images" / "val" / "00001.jpg").st_mtime_ns == stamp
    assert list(tmp_path.iterdir()) == [again]


def test_splits_and_recipes_differ(folder: Path, tmp_path: Path):
    files = read_files(folder)
    assert files["images/train/00001.jpg"] != files["images/val/00001.jpg"]
    other = provide(Recipe(num_train=6, num_val=3, seed=1), tmp_path)
    assert other.name != folder.name
    assert read_files(other)["images/val/00001.jpg"] != files["images/val/00001.jpg"]


@pytest.mark.parametrize("lost", ["images/val/00002.jpg", "annotations/instances_train.json"])
def test_incomplete_set_is_drawn_anew(folder: Path, tmp_path: Path, lost: str):
    again = provide(RECIPE, tmp_path)
    (again / lost).unlink()
    assert provide(RECIPE, tmp_path) == again
    assert read_files(again) == read_files(folder)
    assert list(tmp_path.iterdir()) == [again]


def test_several_at_once(folder: Path, tmp_path: Path):
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: provide(RECIPE, tmp_path), range(3)))
    (together,) = folders
    assert read_files(together) == read_files(folder)
    assert list(tmp_path.iterdir()) == [together]


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = Recipe(num_train=1, num_val=1)
    assert provide(recipe).parent == tmp_path / "condconv-detection"


def test_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.root") as caught:
        provide(RECIPE, tmp_path / "file")
    assert len(str(caught.value).splitlines()) == 1


def test_contents(drawn: list[tuple[Any, list[dict[str, Any]]]]):
    annotations = [record for _, records in drawn for record in records]
    assert {record["category_id"] for record in annotations} == set(range(1, len(CLASSES) + 1))
    assert 0 < sum(not records for _, records in drawn) < 20
    assert len({image.size for image, _ in drawn}) > 60
    sides = np.array([record["bbox"][2:] for record in annotations])
    assert sides.min() >= 5 and sides.max() > 110
    small, medium, large = np.histogram(sides.prod(1), [0, 32**2, 96**2, 256**2])[0] / len(sides)
    assert small > 0.05 and medium > 0.3 and large > 0.03
    for image, records in drawn:
        for record in records:
            x, y, width, height = record["bbox"]
            assert x >= 0 and y >= 0 and x + width <= image.width and y + height <= image.height
            assert 0 < record["area"] <= width * height + 1


def test_boxes_are_tight(monkeypatch: pytest.MonkeyPatch):
    """One bright shape on black: the box is where the light is."""

    def paint(random: Any, region: Any, alpha: Any, *_: Any) -> None:
        region[:] = 255 * alpha

    def draw_black(random: Any, height: int, width: int) -> Any:
        return np.zeros((3, height, width), np.float32)

    monkeypatch.setattr("detection.data.shapes._paint", paint)
    monkeypatch.setattr("detection.data.shapes._draw_texture", draw_black)
    monkeypatch.setattr("detection.data.shapes._draw_scribble", lambda *_, **__: None)
    recipe = Recipe(max_objects=1, max_distractors=0, max_noise=0, max_blur=0, empty=0.0)
    found = 0
    for seed in range(40):
        image, records = draw_image(np.random.default_rng(seed), recipe)
        for record in records:
            lit = np.asarray(image)[..., 0] > 40
            rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
            x, y, width, height = record["bbox"]
            seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.array([x, y, x + width, y + height]) - seen).max() < 1.6
            found += 1
    assert found > 30


def test_json_counts_ids_over_the_split(folder: Path):
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    ids = [record["id"] for record in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"num_train": "x"}, r"data\.num_train=x: give a whole number"),
        ({"num_val": 0}, r"data\.num_val=0"),
        ({"image_size": [64]}, r"data\.image_size=\[64\]: give \[least, most\]"),
        ({"object_size": [30, 20]}, r"data\.object_size"),
    ],
)
def test_a_wrong_recipe_names_its_key(wrong: dict[str, Any], answer: str):
    with pytest.raises(UserError, match=answer):
        Recipe(**wrong)
