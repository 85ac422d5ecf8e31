from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection.errors import UserError
from detection.importers.label_maps import default_categories, read_categories


def write_json(path: Path, *categories: tuple[int, str]) -> Path:
    records = [{"id": id, "name": name, "supercategory": ""} for id, name in categories]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": records}))
    return path


def test_coco() -> None:
    categories = default_categories(90)
    assert list(categories) == [id for id, _ in categories.values()] == list(range(1, 91))
    names = dict(categories.values())
    assert len({name for name in names.values() if not name.startswith("id_")}) == 80
    known = {1: "person", 11: "fire hydrant", 12: "id_12", 13: "stop sign", 25: "giraffe"}
    known |= {27: "backpack", 44: "bottle", 62: "chair", 67: "dining table", 70: "toilet"}
    known |= {72: "tv", 82: "refrigerator", 84: "book", 90: "toothbrush"}
    assert {id: names[id] for id in known} == known


def test_without_names() -> None:
    assert default_categories(2) == {1: (1, "id_1"), 2: (2, "id_2")}


def test_names_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\n\n traffic light \n")
    assert read_categories(path, 2) == {1: (1, "cat"), 2: (2, "traffic light")}


def test_as_many_categories_as_classes_keep_their_ids(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", (7, "dog"), (0, "cat"))
    assert read_categories(path, 2) == {1: (0, "cat"), 2: (7, "dog")}


def test_fewer_categories_than_classes_go_by_id(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", (3, "dog"), (1, "cat"))
    assert read_categories(path, 3) == {1: (1, "cat"), 3: (3, "dog")}


@pytest.mark.parametrize(
    ("categories", "words"),
    [
        ([(1, "cat"), (2, "dog"), (3, "cow"), (4, "pig")], "4 categories, the network has 3"),
        ([(1, "cat"), (4, "dog")], "2 categories, the network has 3"),
        ([(0, "cat"), (1, "dog")], "2 categories, the network has 3"),
        ([], "0 categories, the network has 3"),
        ([(1, "cat"), (1, "dog"), (2, "cow")], "same id"),
    ],
)
def test_other_classes_than_the_networks(tmp_path: Path, categories: list, words: str) -> None:
    path = write_json(tmp_path / "a.json", *categories)
    with pytest.raises(UserError, match=words):
        read_categories(path, 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "no json"),
        ("a.json", "{}"),
        ("a.json", '{"categories": [{"id": "x", "name": "cat"}]}'),
        ("a.json", "[1]"),
        ("absent.txt", None),
        ("few.txt", "cat\n"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read_categories(tmp_path / name, 3)
