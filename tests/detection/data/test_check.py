from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.data.check import main

CLASSES = [{"id": 4, "name": "cat [/red]"}, {"id": 2, "name": "dog"}]


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """Four images in tmp_path/images, the first three with boxes."""
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for name in "abcd":
        pixels = random.integers(0, 256, (200, 300, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    boxes = [[10, 10, 3, 3], [0, 0, 40, 40], [5, 5, 100, 120]]
    return {
        "images": [
            {"id": i, "file_name": f"{name}.png", "width": 300, "height": 200}
            for i, name in enumerate("abcd", start=1)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 2, "bbox": box, "area": box[2] * box[3]}
            | {"iscrowd": 0}
            for i, box in enumerate(boxes, start=1)
        ],
        "categories": [*CLASSES],
    }


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command; gives its exit status, the text on both streams and what --json wrote."""

    def check(content: Any, *arguments: str) -> tuple[Any, str, dict[str, Any]]:
        (tmp_path / "train.json").write_text(json.dumps(content))
        files = ["--images", str(tmp_path / "images"), "--json", str(tmp_path / "report.json")]
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / "train.json"), *files, *arguments])
        report = tmp_path / "report.json"
        return (
            caught.value.code,
            "".join(capsys.readouterr()),
            json.loads(report.read_text()) if report.exists() else {},
        )

    return check


def faults(report: dict[str, Any]) -> dict[str, int]:
    return {fault["kind"]: fault["count"] for fault in report["faults"]}


def test_a_clean_split(content: dict[str, Any], check: Callable[..., Any]):
    content["annotations"].append({**content["annotations"][2], "id": 9, "iscrowd": 1})
    status, text, report = check(content)
    assert status == 0 and "no faults" in text and "cat [/red] 0" in text
    del report["annotations"]
    assert report == {
        "num_images": 4,
        "num_images_without_boxes": 1,
        "num_boxes": 3,
        "num_crowds": 1,
        "boxes_per_class": {"dog": 3, "cat [/red]": 0},
        "boxes_per_coco_size": {"small": 1, "medium": 1, "large": 1},
        "boxes_per_side": {"0-2": 0, "2-4": 1, "4-8": 0, "8-16": 0, "16-32": 0}
        | {"32-64": 1, "64-128": 1},
        "faults": [],
    }


def test_a_split_without_boxes(content: dict[str, Any], check: Callable[..., Any]):
    content["annotations"] = []
    status, _, report = check(content)
    assert status == 1 and faults(report) == {"no boxes to find": 1}
    assert report["num_images_without_boxes"] == 4 and report["boxes_per_side"] == {}


def test_more_boxes_in_an_image_than_training_takes(
    content: dict[str, Any], check: Callable[..., Any]
):
    content["annotations"][1]["image_id"] = 1
    assert not faults(check(content)[2])
    status, _, report = check(content, "--max-boxes", "1")
    kind = "images with more than max_boxes=1 boxes: raise data.augmentation.max_boxes"
    assert status == 1
    assert report["faults"] == [{"kind": kind, "count": 1, "cases": ["a.png: 2"]}]


def cut_file(folder: Path, content: dict[str, Any]) -> None:
    file = folder / "images" / "b.png"
    file.write_bytes(file.read_bytes()[:300])


def copy_file(folder: Path, content: dict[str, Any]) -> None:
    shutil.copy(folder / "images" / "a.png", folder / "images" / "c.png")


def name_file_twice(folder: Path, content: dict[str, Any]) -> None:
    content["images"][2]["file_name"] = "a.png"


def make_folder(folder: Path, content: dict[str, Any]) -> None:
    (folder / "images" / "b.png").unlink()
    (folder / "images" / "b.png").mkdir()


def remove_file(folder: Path, content: dict[str, Any]) -> None:
    (folder / "images" / "b.png").unlink()


def repeat_image_id(folder: Path, content: dict[str, Any]) -> None:
    Image.new("RGB", (300, 200)).save(folder / "images" / "e.png")
    content["images"].append({**content["images"][3], "file_name": "e.png"})


def leave_size_to_a_broken_file(folder: Path, content: dict[str, Any]) -> None:
    (folder / "images" / "b.png").write_bytes(b"no image")
    del content["images"][1]["width"]


def add_class(class_id: int, name: str) -> Callable[[Path, dict[str, Any]], None]:
    return lambda folder, content: content["categories"].append({"id": class_id, "name": name})


def change(section: str, **values: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda folder, content: content[section][1].update(values)


@pytest.mark.parametrize(
    ("harm", "kind", "case"),
    [
        (cut_file, "images that cannot be read", "b.png: "),
        (make_folder, "images that cannot be read", "b.png: Is a directory"),
        (remove_file, "images that are missing", "b.png"),
        (
            leave_size_to_a_broken_file,
            "images of unstated size that cannot be read to find it, left out",
            "b.png: image 2",
        ),
        (repeat_image_id, "ids of several images", "2 images have the id 4"),
        (add_class(2, "fox"), "ids of several categories", "2 categories have the id 2"),
        (add_class(9, "dog"), "names of several categories", "2 categories have the name 'dog'"),
        (copy_file, "images twice in the split", "c.png is a.png"),
        (name_file_twice, "images twice in the split", "a.png is a.png"),
        (
            change("images", width=301),
            "images of another size than stated",
            "b.png: it is 300 x 200, the annotations say 301 x 200",
        ),
        (change("annotations", image_id=8), "annotations of unknown images, dropped", "image 8"),
        (change("annotations", category_id=8), "annotations of unknown categories, dropped", "8"),
        (change("annotations", id=1), "annotations with the id of another, numbered", "n 1"),
        (change("annotations", bbox=[1, 1, 0, 2]), "boxes with no area, dropped", "n 2"),
        (change("annotations", bbox=[300, 1, 9, 2]), "boxes outside of their image, dropped", ""),
        (
            change("annotations", bbox=[290, 1, 20, 2]),
            "boxes over the edge of their image, clipped for training",
            "annotation 2",
        ),
    ],
)
def test_each_fault_is_found(
    content: dict[str, Any],
    check: Callable[..., Any],
    tmp_path: Path,
    harm: Callable[..., None],
    kind: str,
    case: str,
):
    harm(tmp_path, content)
    status, text, report = check(content)
    assert status == 1 and "no faults" not in text
    assert faults(report) == {kind: 1}
    assert case in report["faults"][0]["cases"][0]


def test_other_splits(content: dict[str, Any], check: Callable[..., Any], tmp_path: Path):
    (tmp_path / "others").mkdir()
    shutil.copy(tmp_path / "images" / "a.png", tmp_path / "others" / "x.png")
    shutil.copy(tmp_path / "images" / "d.png", tmp_path / "others" / "y.png")
    for name, classes in (("val", CLASSES), ("test", CLASSES[:1])):
        images = [
            {"id": i, "file_name": f"{letter}.png", "width": 300, "height": 200}
            for i, letter in enumerate("xy")
        ]
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"images": images, "annotations": [], "categories": classes})
        )
    others: list[str] = []
    for name in ("val", "test"):
        others += ["--other", str(tmp_path / f"{name}.json")]
        others += ["--other-images", str(tmp_path / "others")]
    status, _, report = check(content, *others)
    assert status == 1
    assert faults(report) == {
        "images that val.json has as well": 2,
        "images that test.json has as well": 2,
        "classes differ from test.json": 1,
    }
    assert report["faults"][0]["cases"] == ["a.png is x.png", "d.png is y.png"]
    assert check(content, "--other", str(tmp_path / "train.json"))[0] == 1
    assert check(content, *others[:-2])[0] == 2


def test_all_cases_of_all_faults_are_listed(
    content: dict[str, Any], check: Callable[..., Any], tmp_path: Path
):
    for name in "bd":
        (tmp_path / "images" / f"{name}.png").unlink()
    content["annotations"] += [
        {**content["annotations"][0], "id": 7, "image_id": 99},
        {**content["annotations"][0], "id": 8, "image_id": 98},
        {**content["annotations"][0], "id": 9, "bbox": [290, 0, 20, 2]},
        {**content["annotations"][0], "id": 10, "bbox": [0, 190, 2, 20]},
    ]
    status, _, report = check(content)
    assert status == 1
    assert {fault["kind"]: fault["cases"] for fault in report["faults"]} == {
        "annotations of unknown images, dropped": [
            "annotation 7, image 99",
            "annotation 8, image 98",
        ],
        "boxes over the edge of their image, clipped for training": [
            "annotation 9",
            "annotation 10",
        ],
        "images that are missing": ["b.png", "d.png"],
    }


def test_categories_of_one_name_are_counted_together(
    content: dict[str, Any], check: Callable[..., Any]
):
    content["categories"] = [{"id": i, "name": "dog"} for i in (2, 3)]
    content["annotations"][0]["category_id"] = 3
    assert check(content)[2]["boxes_per_class"] == {"dog": 3}


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder, content: content.pop("images"), 'it has no list "images"'),
        (change("images", file_name="../a.png"), "which is no file inside the image folder"),
        (lambda folder, _: shutil.rmtree(folder / "images"), "no such folder of images"),
        (
            lambda _, content: content.update(images=[{"id": 1, "file_name": "none.png"}]),
            "no image that",
        ),
    ],
)
def test_what_gives_no_report_is_one_line(
    content: dict[str, Any],
    check: Callable[..., Any],
    tmp_path: Path,
    harm: Callable[..., Any],
    words: str,
):
    harm(tmp_path, content)
    status, text, report = check(content)
    (line,) = text.splitlines()
    assert status == 2 and line.startswith("error: ") and words in line
    assert report == {"error": line.removeprefix("error: ")}


def test_a_report_that_cannot_be_written(
    content: dict[str, Any], check: Callable[..., Any], tmp_path: Path
):
    status, text, report = check(content, "--json", str(tmp_path))
    assert status == 2 and text.startswith("error: cannot write") and not report
