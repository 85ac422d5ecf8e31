from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo
from pycocotools.coco import COCO

from detection.data import check
from detection.data.coco import CocoIndex, check_same_categories, check_trainable
from detection.errors import UserError
from detection.structures import Category

REAL_DATA = Path(__file__).parents[4] / "shared" / "data"

CONTENT: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 10},
        {"id": 5, "file_name": "c.png", "width": 8, "height": 8},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 3,
            "category_id": 9,
            "bbox": [1.5, 2, 5, 6],
            "area": 11.0,
            "iscrowd": 0,
        },
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [4, 4, 8, 2], "area": 16, "iscrowd": 0},
        {"id": 4, "image_id": 7, "category_id": 9, "bbox": [1, 1, 1, 1], "area": 1, "iscrowd": 0},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
}


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(CONTENT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for record in CONTENT["images"]:
        path = tmp_path / record["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (record["width"], record["height"])).save(path)
    return tmp_path


def load(folder: Path, content: Any, ids: Path | None = None) -> CocoIndex:
    annotations = folder / "instances.json"
    annotations.write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoIndex.load(images=folder, annotations=annotations, ids=ids)


def error_line(folder: Path, content: Any, ids: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, content, ids)
    (line,) = str(caught.value).splitlines()
    return line


def test_index(folder: Path, content: dict[str, Any]):
    index = load(folder, content)
    assert len(index) == 3
    assert index.categories == (Category(2, "cat"), Category(9, "dog"))
    assert list(index.image_ids) == [7, 3, 5]
    assert list(index.file_names) == ["a.png", "sub/b.png", "c.png"]
    assert list(index.sizes) == [(30, 40), (10, 20), (8, 8)]
    assert index.boxes(0).tolist() == [[4, 4, 12, 6], [1, 1, 2, 2]]
    assert index.labels(0).tolist() == [0, 1]
    assert index.boxes(1).tolist() == [[1.5, 2, 6.5, 8]]
    assert index.labels(1).tolist() == [1]
    assert index.boxes(2).shape == (0, 4) and index.boxes(2).dtype == torch.float32
    assert index.labels(2).shape == (0,) and index.labels(2).dtype == torch.int64
    assert index.describe() == []


def test_no_annotations(folder: Path, content: dict[str, Any]):
    content["annotations"] = []
    index = load(folder, content)
    assert all(index.boxes(i).shape == (0, 4) for i in range(3))
    assert index.ground_truth()["annotations"] == []


def test_ground_truth_loads_in_pycocotools(folder: Path, content: dict[str, Any]):
    content["annotations"][2]["bbox"] = [35.0, 25.0, 10.0, 10.0]
    truth = load(folder, content).ground_truth()
    coco = COCO()
    coco.dataset = truth  # pyright: ignore[reportAttributeAccessIssue]
    coco.createIndex()
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4]
    crowd, cut, _ = coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    assert (crowd["iscrowd"], crowd["area"], crowd["category_id"]) == (1, 81, 2)
    assert (cut["iscrowd"], cut["bbox"]) == (0, [35, 25, 10, 10])
    assert coco.loadImgs([3])[0]["file_name"] == "sub/b.png"
    assert json.loads(json.dumps(truth)) == truth


@pytest.mark.parametrize(
    ("bbox", "kind"),
    [
        ([4, 4, 0, 2], "no area"),
        ([4, 4, 2, -1], "no area"),
        ([math.nan, 4, 2, 2], "four finite numbers"),
        ([4, 4, math.inf, 2], "four finite numbers"),
        ([4, 4, 10**400, 2], "four finite numbers"),
        ([4, 4, "2", 2], "four finite numbers"),
        ([4, 4, True, 2], "four finite numbers"),
        ([4, 4, 2], "four finite numbers"),
        (None, "four finite numbers"),
        ({"x": 1}, "four finite numbers"),
        ([40, 4, 5, 5], "outside of their image"),
        ([-9, -9, 5, 5], "outside of their image"),
        ([4, 4, 1e-9, 1], "outside of their image"),
    ],
)
def test_broken_boxes_are_left_out(folder: Path, content: dict[str, Any], bbox: Any, kind: str):
    content["annotations"][2]["bbox"] = bbox
    index = load(folder, content)
    assert index.boxes(0).tolist() == [[1, 1, 2, 2]]
    assert index.labels(0).tolist() == [1]
    assert len(index.ground_truth()["annotations"]) == 3
    (line,) = index.describe()
    assert kind in line and line.endswith(": 1 (first: annotation 3)")
    assert line.startswith("instances.json: ")


def test_boxes_over_the_edge_are_clipped(folder: Path, content: dict[str, Any]):
    content["annotations"][2]["bbox"] = [-2, 25, 8, 10]
    index = load(folder, content)
    assert index.boxes(0)[0].tolist() == [0, 25, 6, 30]
    assert "over the edge" in index.describe()[0]


def test_unknown_references_are_counted(folder: Path, content: dict[str, Any]):
    content["annotations"][0]["image_id"] = 99
    content["annotations"][2]["category_id"] = [1]
    content["annotations"][3]["category_id"] = 77
    index = load(folder, content)
    assert sum(len(index.boxes(i)) for i in range(3)) == 0
    assert [line.partition(": ")[2] for line in index.describe()] == [
        "annotations of unknown images, dropped: 1 (first: annotation 1, image 99)",
        "annotations of unknown categories, dropped: 2 "
        "(first: annotation 3, category [1] is a list; ids are whole numbers)",
        "there are no boxes to find",
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"category_id": "2"}, "category '2' is a text; ids are whole numbers"),
        ({"bbox": None}, "boxes that are not four finite numbers, dropped: 4"),
        ({"iscrowd": 1}, "its boxes are all crowds"),
    ],
)
def test_a_split_that_keeps_no_annotation_is_not_trained_on(
    folder: Path, content: dict[str, Any], changes: dict[str, Any], reason: str
):
    check_trainable(load(folder, content))
    check_trainable(load(folder, {**content, "annotations": []}))
    for record in content["annotations"]:
        record.update(changes)
    with pytest.raises(UserError, match=f"no annotation is left to train on: .*{reason}"):
        check_trainable(load(folder, content))


def test_images_with_more_boxes_than_training_takes(folder: Path, content: dict[str, Any]):
    index = load(folder, content)
    assert index.count_boxes().tolist() == [2, 1, 0] and index.describe(2) == []
    (line,) = index.describe(1)
    assert "1 images have more than max_boxes=1 boxes (most: 2): raise data.augm" in line


def test_a_byte_order_mark(folder: Path, content: dict[str, Any]):
    assert len(load(folder, "\ufeff" + json.dumps(content))) == 3


@pytest.mark.parametrize("size", [(0, 8), (8, -1), (None, 8), (1e6, 1e6), ("8", 8)])
def test_impossible_sizes_are_read_from_the_file(
    folder: Path, content: dict[str, Any], size: tuple[Any, Any]
):
    """An image of 10^12 pixels that cannot be read could not be replaced by a black one."""
    content["images"][0].update(zip(("width", "height"), size, strict=True))
    index = load(folder, content)
    assert index.sizes[0] == (30, 40)
    assert list(index.problems) == [
        "images without a possible width and height, read from the file"
    ]


def test_a_size_that_pillow_cannot_read(folder: Path, content: dict[str, Any]):
    """Pillow refuses this PNG with a ValueError, which is none of its own errors."""
    text = PngInfo()
    text.add_text("comment", "x" * (MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (40, 30)).save(folder / "a.png", pnginfo=text)
    del content["images"][0]["width"]
    assert "'a.png' cannot be read to find them" in error_line(folder, content)


def test_missing_fields_are_repaired(folder: Path, content: dict[str, Any]):
    for key in ("id", "area", "iscrowd"):
        del content["annotations"][2][key]
    for key in ("width", "height"):
        del content["images"][0][key]
    index = load(folder, content)
    assert index.sizes[0] == (30, 40)
    assert sorted(index.problems.values()) == [1, 1, 1, 1]
    assert index.ground_truth()["annotations"][1] == {
        "id": 2,
        "image_id": 7,
        "category_id": 2,
        "bbox": [4, 4, 8, 2],
        "area": 16,
        "iscrowd": 0,
    }


@pytest.mark.parametrize("text", ["3\n7\n", "[7, 3]", " 7 3"])
def test_ids_choose_images(folder: Path, content: dict[str, Any], text: str):
    ids = folder / "ids.txt"
    ids.write_text(text)
    (folder / "c.png").unlink()
    index = load(folder, content, ids)
    assert list(index.image_ids) == [7, 3]
    assert [len(index.boxes(i)) for i in range(2)] == [2, 1]
    assert index.describe() == []


@pytest.mark.parametrize(
    ("text", "part"),
    [("8\n9\n3", "2 of its ids are not in"), ("a b", "not a list"), ("", "names no images")],
)
def test_bad_ids(folder: Path, content: dict[str, Any], text: str, part: str):
    ids = folder / "ids.txt"
    ids.write_text(text)
    line = error_line(folder, content, ids)
    assert part in line and "ids.txt" in line
    assert "no such file" in error_line(folder, content, folder / "none.txt")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[]", "not in COCO format"),
        ("{}", '"images"'),
        ('{"images": [], "annotations": {}, "categories": []}', '"annotations"'),
        ('{"images": [], "annotations": []}', '"categories"'),
    ],
)
def test_not_coco(folder: Path, text: str, part: str):
    assert part in error_line(folder, text)


@pytest.mark.parametrize(
    ("section", "records", "part"),
    [
        ("categories", [], "category table is empty"),
        ("categories", [{"id": 1}], 'category 0 has no "name"'),
        ("categories", [{"id": "1", "name": "a"}], "category 0"),
        ("categories", [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "2 categories"),
        ("categories", [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "the name 'a'"),
        ("images", [], "names no images"),
        ("images", ["a.png"], "image 0 is not an object"),
        ("images", [{"file_name": "a.png"}], 'image 0 has no "id"'),
        ("images", [{"id": 1, "file_name": 4}], '"file_name"'),
        ("images", [CONTENT["images"][0]] * 2, "2 images have the id 7"),
        ("images", [{"id": 1, "file_name": "../a.png"}], "'../a.png'"),
        ("images", [{"id": 1, "file_name": "/a.png"}], "'/a.png'"),
        ("images", [{"id": 1, "file_name": ""}], "''"),
        ("images", [{"id": 2**63, "file_name": "a.png"}], "64 bits"),
        ("categories", [{"id": 1, "name": "dog\n"}], "'dog\\n': take the control characters out"),
        ("images", [{"id": 1, "file_name": "no\nfile.png"}], "control characters"),
        ("images", [{"id": 1, "file_name": "no/file.png"}], "is it the right folder?"),
        ("images", [{"id": 1, "file_name": "sub\\b.png"}], "write / for the backslashes"),
        ("images", [{"id": 1, "file_name": "instances.json"}], "no possible width and height"),
        ("annotations", [None], "annotation 0 is not an object"),
        ("annotations", [{"image_id": 7, "bbox": []}], 'annotation 0 has no "category_id"'),
    ],
)
def test_bad_records(
    folder: Path, content: dict[str, Any], section: str, records: list[Any], part: str
):
    content[section] = records
    line = error_line(folder, content)
    assert part in line and str(folder) in line


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 9)
    | st.sampled_from([2**63, -(2**63), 10**9, 10**400, 1e-300, 1e300])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a.png", "/a.png", "../a.png", "sub", "a\0.png", "\ud800/a.png", "x\n\x1b"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@st.composite
def mutated_files(draw: st.DrawFn) -> str:
    """The text of a COCO file after some random changes."""
    content = copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(1, 4))):
        where, key = draw(st.sampled_from(list_places(content)))
        change = draw(st.sampled_from(["replace", "remove", "repeat", "move"]))
        if change == "replace":
            is_number = isinstance(where[key], (int, float))
            where[key] = draw(
                st.sampled_from([-1, 0, 0.5, 8, 1e9]) | VALUES if is_number else VALUES
            )
        elif change == "remove":
            del where[key]
        elif change == "repeat" and isinstance(where, list):
            where.insert(key, copy.deepcopy(where[key]))
        else:
            other, other_key = draw(st.sampled_from(list_places(content)))
            where[key] = copy.deepcopy(other[other_key])
        if not list_places(content):
            break
    text = json.dumps(content)
    if draw(st.integers(0, 9)) == 0:
        start, length = draw(st.integers(0, len(text))), draw(st.integers(1, 50))
        text = text[:start] + draw(st.text(max_size=3)) + text[start + length :]
    return text


def list_places(value: Any) -> list[tuple[Any, Any]]:
    """Every item of every list and object, as (the list or object, index or key)."""
    places = []
    for key in value if isinstance(value, dict) else range(len(value)):
        places.append((value, key))
        if isinstance(value[key], (dict, list)):
            places += list_places(value[key])
    return places


def check_any_file_loads_or_is_refused(folder: Path, text: str) -> None:
    """A clean load that counts whatever it leaves out, or one line; the same of the check."""
    (folder / "instances.json").write_text(text, encoding="utf-8", errors="replace")
    is_checked = check_any_file_is_reported(folder)
    try:
        index = CocoIndex.load(images=folder, annotations=folder / "instances.json")
    except UserError as error:
        line = str(error)
        assert is_one_line(line)
        return
    assert is_checked
    assert all(map(is_one_line, index.describe()))
    assert all(is_one_line(name) for name in index.file_names)
    assert all(is_one_line(category.name) for category in index.categories)
    for i in range(len(index)):
        assert Path(folder, index.file_names[i]).resolve().is_relative_to(folder.resolve())
        height, width = index.sizes[i]
        boxes, labels = index.boxes(i), index.labels(i)
        assert len(boxes) == len(labels) and torch.isfinite(boxes).all()
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all()
        assert (boxes[:, [1, 3]] <= height).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert torch.isin(labels, torch.arange(len(index.categories))).all()
    truth = index.ground_truth()
    assert json.loads(json.dumps(truth, allow_nan=False)) == truth
    torch.tensor([image["id"] for image in truth["images"]])
    torch.tensor([category["id"] for category in truth["categories"]])
    dropped = sum(count for kind, count in index.problems.items() if kind.endswith("dropped"))
    assert dropped + len(truth["annotations"]) == len(json.loads(text)["annotations"])


def check_any_file_is_reported(folder: Path) -> bool:
    """Whether the check gives a report, which then agrees with its exit status, or one line."""
    report_file, text, errors = folder / "report.json", io.StringIO(), io.StringIO()
    report_file.unlink(missing_ok=True)
    files = [str(folder / "instances.json"), "--images", str(folder), "--json", str(report_file)]
    with (
        pytest.raises(SystemExit) as caught,
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(errors),
    ):
        check.main(files)
    status, report = caught.value.code, json.loads(report_file.read_text())
    assert all(map(is_one_line, text.getvalue().splitlines()))
    if status == 2:
        assert errors.getvalue() == f"error: {report['error']}\n" and not text.getvalue()
        assert is_one_line(report["error"])
        return False
    assert status == (1 if report["faults"] else 0) and not errors.getvalue()
    assert sum(report["boxes_per_class"].values()) == report["num_boxes"]
    for fault in report["faults"]:
        assert fault["count"] == len(fault["cases"]) > 0
        assert all(map(is_one_line, [fault["kind"], *fault["cases"]]))
    return True


def is_one_line(text: str) -> bool:
    """Whether a terminal takes it: no control characters, no halves of surrogate pairs."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


FUZZING = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(FUZZING, derandomize=True, max_examples=100)
@given(text=mutated_files())
def test_mutated_files(folder: Path, text: str):
    check_any_file_loads_or_is_refused(folder, text)


@pytest.mark.slow
@settings(FUZZING, max_examples=1000)
@given(text=mutated_files())
def test_many_mutated_files(folder: Path, text: str):
    check_any_file_loads_or_is_refused(folder, text)


def test_missing_files(folder: Path):
    for file in (folder / "none.json", folder):
        with pytest.raises(UserError, match=str(file)):
            CocoIndex.load(images=folder, annotations=file)
    (folder / "some.json").write_text(json.dumps(CONTENT))
    with pytest.raises(UserError, match="no such folder of images"):
        CocoIndex.load(images=folder / "none", annotations=folder / "some.json")


def test_not_text(folder: Path):
    (folder / "some.json").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not a text file"):
        CocoIndex.load(images=folder, annotations=folder / "some.json")


def test_check_same_categories(folder: Path, content: dict[str, Any]):
    train, same = load(folder, content), load(folder, content)
    check_same_categories(train, same)
    content["categories"].append({"id": 4, "name": "bird"})
    more = load(folder, content)
    for pair in ((train, more), (more, train)):
        with pytest.raises(UserError, match="4 'bird'"):
            check_same_categories(*pair)
    content["categories"] = [{"id": 9, "name": "dog"}, {"id": 52, "name": "cat"}]
    with pytest.raises(UserError, match=r"has the category 2 'cat', .* has it as id 52: both need"):
        check_same_categories(train, load(folder, content))


@pytest.mark.parametrize(
    ("name", "split", "num_images", "num_boxes", "num_classes"),
    [
        ("bccd", "train", 292, 3941, 3),
        ("bccd", "val", 72, 945, 3),
        ("coco128", "train", 96, 717, 80),
        ("coco128", "val", 32, 212, 80),
    ],
)
def test_real_sets(name: str, split: str, num_images: int, num_boxes: int, num_classes: int):
    root = REAL_DATA / name
    if not root.is_dir():
        pytest.skip(f"the real images of {name} are not on this machine")
    index = CocoIndex.load(
        images=root / "images", annotations=root / "annotations" / f"instances_{split}.json"
    )
    assert len(index) == num_images and len(index.categories) == num_classes
    assert sum(len(index.boxes(i)) for i in range(num_images)) == num_boxes
    assert index.describe() == []
    stated = json.loads(index.annotations_file.read_text())["annotations"]
    ours = index.ground_truth()["annotations"]
    key = lambda a: (a["image_id"], a["category_id"], a["bbox"], a["area"])  # noqa: E731
    assert sorted(map(key, ours)) == sorted(map(key, stated))
