"""Small folders by hand: what is in the JSON, and what is told of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detection.data.coco import CocoIndex
from detection.data.convert import main, read_names
from detection.errors import UserError
from detection.images import load_annotated_image, load_image


def save_image(
    path: Path, size: tuple[int, int] = (200, 100), orientation: int | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def save_voc(path: Path, *things: tuple[str, str], size: tuple[int, int] = (200, 100)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(f"<object><name>{name}</name>{rest}</object>" for name, rest in things)
    width, height = size
    path.write_text(
        f"<annotation><filename>{path.stem}.jpg</filename><size><width>{width}</width>"
        f"<height>{height}</height></size>{objects}</annotation>"
    )


def box(*corners: float) -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    inner = "".join(f"<{key}>{c}</{key}>" for key, c in zip(keys, corners, strict=True))
    return f"<bndbox>{inner}</bndbox>"


def convert(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "new" / "all.json"
    main([*arguments, "--output", str(output)])
    return json.loads(output.read_text())


def flatten(content: dict[str, Any]) -> dict[str, list[tuple[str, list[float]]]]:
    """The boxes and class names by file name."""
    names = {own["id"]: own["name"] for own in content["categories"]}
    return {
        image["file_name"]: [
            (names[own["category_id"]], own["bbox"])
            for own in content["annotations"]
            if own["image_id"] == image["id"]
        ]
        for image in content["images"]
    }


@pytest.fixture
def voc(tmp_path: Path) -> list[str]:
    images, annotations = tmp_path / "images", tmp_path / "xml"
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        save_image(images / name)
    save_voc(annotations / "a.xml", ("dog", box(10, 20, 60, 50)), ("cat", box(0.5, 0, 200, 100)))
    save_voc(annotations / "b.xml")
    save_voc(annotations / "sub/c.xml", ("cat", "<difficult>1</difficult>" + box(1, 2, 3, 4)))
    return ["voc", "--images", str(images), "--annotations", str(annotations)]


@pytest.fixture
def yolo(tmp_path: Path) -> list[str]:
    images, labels = tmp_path / "images", tmp_path / "labels"
    for name in ("a.jpg", "b.png", "train/c.jpg"):
        save_image(images / name)
    (labels / "train").mkdir(parents=True)
    (labels / "a.txt").write_text("0 0.5 0.5 0.2 0.4\n1 0.25 0.5 0.5 1 0.9\n\n")
    (labels / "train/c.txt").write_text("1 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n")
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog}\n")
    return ["yolo", "--images", str(images), "--labels", str(labels),
            "--names", str(tmp_path / "data.yaml")]  # fmt: skip


def test_voc(voc: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = convert(tmp_path, *voc)
    assert [own["name"] for own in content["categories"]] == ["cat", "dog"]
    assert flatten(content) == {
        "a.jpg": [("dog", [10, 20, 50, 30]), ("cat", [0.5, 0, 199.5, 100])],
        "b.png": [],
        "sub/c.jpg": [("cat", [1, 2, 2, 2])],
    }
    assert [own["iscrowd"] for own in content["annotations"]] == [0, 0, 1]
    assert all((own["width"], own["height"]) == (200, 100) for own in content["images"])
    printed = capsys.readouterr()
    assert "3 images, 3 boxes: cat 2, dog 1" in printed.out and printed.err == ""
    index = CocoIndex.load(images=tmp_path / "images", annotations=tmp_path / "new" / "all.json")
    assert len(index) == 3 and index.describe() == []


def test_voc_files_need_not_name_their_image(voc: list[str], tmp_path: Path) -> None:
    for file, text in (("a", ""), ("b", "<filename>/</filename>")):
        (tmp_path / "xml" / f"{file}.xml").write_text(f"<annotation>{text}</annotation>")
    assert list(flatten(convert(tmp_path, *voc))) == ["a.jpg", "b.png", "sub/c.jpg"]


def test_yolo(yolo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = flatten(convert(tmp_path, *yolo))
    assert list(found) == ["a.jpg", "b.png", "train/c.jpg"]
    (cat, first), (dog, second) = found["a.jpg"]
    assert (cat, dog) == ("cat", "dog") and found["b.png"] == []
    assert first == pytest.approx([80, 30, 40, 40]) and second == pytest.approx([0, 0, 100, 100])
    assert found["train/c.jpg"] == [("dog", pytest.approx([20, 20, 40, 40]))]
    assert capsys.readouterr().err == ""


def test_what_cannot_be_taken_is_counted(
    voc: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "xml"
    (folder / "broken.xml").write_text("<annotation>")
    save_voc(folder / "lost.xml")
    save_image(tmp_path / "images" / "d.jpg", (50, 80))
    save_voc(folder / "d.xml", ("cat", box(1, 2, float("nan"), 4)), ("", box(1, 2, 3, 4)))
    save_image(tmp_path / "images" / "turned.jpg", (50, 80), orientation=6)
    save_voc(folder / "turned.xml", size=(80, 50))
    save_image(tmp_path / "images" / "swapped.jpg", (50, 80))
    save_voc(folder / "swapped.xml", size=(80, 50))
    save_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "e.jpg").write_bytes(b"no image")
    save_voc(folder / "e.xml")
    content = convert(tmp_path, *voc)
    sizes = {own["file_name"]: (own["width"], own["height"]) for own in content["images"]}
    assert sizes["d.jpg"] == (50, 80) and sizes["turned.jpg"] == (80, 50)
    assert sizes["swapped.jpg"] == (50, 80) and not {"a.png", "e.jpg"} & sizes.keys()
    told = capsys.readouterr().err
    for line in (
        "XML files that cannot be read: 1 (first: broken.xml",
        "annotations without an image: 1 (first: lost.xml)",
        "boxes that cannot be read: 2 (first: d.xml)",
        "sizes that are not the image's, which is taken: 2 (first: d.xml)",
        "images that differ from another in the suffix only: left out: 1 "
        "(first: a.png beside a.jpg)",
        "images that cannot be read: left out: 1 (first: e.jpg)",
    ):
        assert line in told


@pytest.mark.parametrize("size", [(80, 48), (64, 64)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_yolo_boxes_lie_in_the_image_as_shown(
    yolo: list[str], tmp_path: Path, size: tuple[int, int], orientation: int
) -> None:
    """In what the loader makes of the image, which turns it or not."""
    stored = Image.new("RGB", size)
    stored.paste((255, 255, 255), (8, 8, 40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "images" / "b.png", exif=exif)
    shown = load_image(tmp_path / "images" / "b.png")
    x1, y1, x2, y2 = shown.getbbox() or (0, 0, 0, 0)
    shares = ((x1 + x2) / 2 / shown.width, (y1 + y2) / 2 / shown.height)
    sides = ((x2 - x1) / shown.width, (y2 - y1) / shown.height)
    (tmp_path / "labels" / "b.txt").write_text(f"0 {' '.join(map(str, shares + sides))}\n")
    content = convert(tmp_path, *yolo)
    ((_, (x, y, width, height)),) = flatten(content)["b.png"]
    (record,) = (own for own in content["images"] if own["file_name"] == "b.png")
    loaded = load_annotated_image(
        tmp_path / "images" / "b.png", (record["height"], record["width"])
    )
    assert loaded.getbbox() == pytest.approx((x, y, x + width, y + height))


def test_texts_with_a_byte_order_mark_and_without_utf_8(
    yolo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "labels" / "a.txt", tmp_path / "data.yaml"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    (tmp_path / "labels" / "b.txt").write_bytes(b"0 0.5 0.5 1 1 \xff\n")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\nb\n")
    found = flatten(convert(tmp_path, *yolo))
    assert [name for name, _ in found["a.jpg"]] == ["cat", "dog"] and "b.png" not in found
    told = "text files that cannot be read, left out with their images: 1 (first: b.txt)\n"
    assert capsys.readouterr().err == f"warning: {told}"
    assert list(flatten(convert(tmp_path, *yolo, "--list", str(tmp_path / "list.txt")))) == [
        "a.jpg"
    ]


@pytest.mark.parametrize(
    "line", ["0 0.5 0.5 0.2", "x 0.5 0.5 0.2 0.4", "0.5 1 1 1 1", "0 nan 0 1 1", "0 1 2 3 4 5 6 7"]
)
def test_yolo_lines_that_cannot_be_read(
    yolo: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels" / "b.txt").write_text(f"{line}\n1 0.5 0.5 1 1\n7 0.5 0.5 1 1\n")
    assert flatten(convert(tmp_path, *yolo))["b.png"] == [("dog", [0, 0, 200, 100])]
    told = capsys.readouterr().err
    assert f"lines that cannot be read: 1 (first: b.txt: {line})" in told
    assert "classes that are none of the 2: 1" in told


def test_classes_can_be_chosen_and_ordered(
    voc: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = convert(tmp_path, *voc, "--classes", "zebra,dog")
    assert [own["name"] for own in content["categories"]] == ["zebra", "dog"]
    assert [own["category_id"] for own in content["annotations"]] == [2]
    assert "boxes of other classes: left out: 2 (first: cat)" in capsys.readouterr().err


def test_a_list_chooses_images_and_all_classes_stay(
    voc: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("b 1\n./images/sub/c.jpg\nz\n\n")
    content = convert(tmp_path, *voc, "--list", str(tmp_path / "train.txt"))
    assert list(flatten(content)) == ["b.png", "sub/c.jpg"]
    assert len(content["categories"]) == 2
    assert "listed images that are not there: 1 (first: z)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/data/train/a.jpg", ["train/a.jpg"]),
        ("./images/val/a.jpg", ["val/a.jpg"]),
        ("val/a", ["val/a.jpg"]),
        ("elsewhere/b.jpg", "no image is left"),
        ("c.jpg", ["c.jpg"]),
        ("c.png", ["c.png"]),
        ("val/c.jpg 1", ["val/c.jpg"]),
        ("my photo.jpg", ["my photo.jpg"]),
        ("my photo", ["my photo.jpg"]),
        ("my", ["my.jpg"]),
        ("a.jpg", "a.jpg may be train/a.jpg or val/a.jpg"),
        ("c", "c may be c.jpg or c.png"),
    ],
)
def test_a_listed_path_means_the_image_in_its_folder(
    tmp_path: Path, line: str, found: list[str] | str
) -> None:
    names = ["train/a.jpg", "val/a.jpg", "val/b.jpg", "c.jpg", "c.png", "val/c.jpg"]
    names += ["my photo.jpg", "my.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    (tmp_path / "list.txt").write_text(f"{line}\n")
    arguments = ["coco", "--annotations", str(tmp_path / "all.json"),
                 "--list", str(tmp_path / "list.txt")]  # fmt: skip
    if isinstance(found, list):
        assert list(flatten(convert(tmp_path, *arguments))) == found
    else:
        with pytest.raises(SystemExit, match=found):
            convert(tmp_path, *arguments)


def test_a_share_is_put_aside_and_stays_the_same(tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": 10 * i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(20)
        ],
        "annotations": [
            {"id": i, "image_id": 10 * (i % 20), "category_id": 5, "bbox": [0, 0, 1, 1]}
            for i in range(1, 41)
        ],
        "categories": [{"id": 5, "name": "cat"}],
    }

    def part(name: str) -> tuple[set[str], set[str]]:
        (tmp_path / "all.json").write_text(json.dumps(content))
        train, val = tmp_path / f"{name}-train.json", tmp_path / f"{name}-val.json"
        main(["coco", "--annotations", str(tmp_path / "all.json"), "--output", str(train),
              "--val-output", str(val), "--val-share", "0.25"])  # fmt: skip
        parts = [json.loads(path.read_text()) for path in (train, val)]
        for own in parts:
            ids = {image["id"] for image in own["images"]}
            assert {one["image_id"] for one in own["annotations"]} == ids
            assert len(own["annotations"]) == 2 * len(ids)
        train_names, val_names = ({i["file_name"] for i in own["images"]} for own in parts)
        return train_names, val_names

    train, val = part("a")
    assert len(train) == 15 and len(val) == 5 and not train & val
    content["images"].reverse()
    assert part("b") == (train, val)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [cat, dog]", ["cat", "dog"]),
        ("names: {0: cat, 2: dog}", ["cat", "class 1", "dog"]),
        ("names: {'0': cat, '1': 7}", ["cat", "7"]),
        ("- cat\n- dog", ["cat", "dog"]),
    ],
)
def test_names(text: str, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(text)
    assert read_names(tmp_path / "data.yaml") == names
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    assert read_names(tmp_path / "classes.txt") == names


@pytest.mark.parametrize("text", ["", "nc: 3", "names: []", "{"])
def test_no_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=r"names no classes|cannot be read"):
        read_names(tmp_path / "data.yaml")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("names: cat", "the names are 'cat': give a list"),
        ("cat", "the names are 'cat': give a list"),
        ("names: [no, yes]", "class 0 is False, not a text: quote its name"),
        ("names: {0: cat, 1: }", "class 1 is None, not a text"),
        ("names: {a: cat}", "'a' is no class number"),
    ],
)
def test_names_that_are_no_texts(text: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=answer):
        read_names(tmp_path / "data.yaml")


def test_a_class_without_a_name_moves_no_other(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n\n")
    with pytest.raises(UserError, match=r"class 1 has no name"):
        read_names(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n\n")
    assert read_names(tmp_path / "classes.txt") == ["cat", "dog"]


def test_mistakes(voc: list[str], tmp_path: Path) -> None:
    for arguments, answer in (
        (["voc", "--images", "/no", "--annotations", str(tmp_path / "xml")], "no such folder"),
        (["coco", "--annotations", "/no"], "/no: no such file"),
        ([*voc, "--list", "/no"], "cannot be read"),
        ([*voc[:-1], str(tmp_path / "images")], "holds no XML files"),
        ([*voc, "--val-output", str(tmp_path / "v"), "--val-share", "0.1"], "puts 0 of 3 images"),
        ([*voc, "--val-output", str(tmp_path / "v"), "--val-share", "0.9"], "puts 3 of 3 images"),
        ([*voc, "--val-output", str(tmp_path / "v"), "--val-share", "20"], "a share between 0"),
        ([*voc, "--val-output", str(tmp_path / "new" / "all.json")], "must be different files"),
        ([*voc, "--val-output", "/dev/null/v.json"], "cannot write /dev/null/v.json"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{answer}"):
            convert(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("section", "records", "answer"),
    [
        ("images", "a", 'it has no list "images"'),
        ("images", [{"id": 1}], r'images\[0\] has no "file_name"'),
        ("images", [{"file_name": "a.jpg"}], r'images\[0\] has no "id"'),
        ("annotations", [{"image_id": 1}], r'annotations\[0\] has no "category_id"'),
        ("annotations", [{"category_id": 1}], r'annotations\[0\] has no "image_id"'),
        ("annotations", [7], r"annotations\[0\] is not an object"),
        ("categories", [{"id": 1}], r'categories\[0\] has no "name"'),
        ("categories", [{"id": "1", "name": "cat"}], r"""categories\[0\] has "id" '1'"""),
    ],
)
def test_a_coco_json_with_faulty_records(
    tmp_path: Path, section: str, records: Any, answer: str
) -> None:
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}
    (tmp_path / "all.json").write_text(json.dumps({**content, section: records}))
    with pytest.raises(SystemExit, match=f"error: .*all.json is not in COCO format: {answer}"):
        convert(tmp_path, "coco", "--annotations", str(tmp_path / "all.json"))


def test_the_real_set_as_voc_and_back(real_data: Path, tmp_path: Path) -> None:
    """BCCD's boxes written as the VOC XML they came from."""
    source = real_data / "bccd" / "annotations" / "instances_val.json"
    content = json.loads(source.read_text())
    for name, boxes in flatten(content).items():
        things = [(label, box(x, y, x + w, y + h)) for label, (x, y, w, h) in boxes]
        save_voc(tmp_path / "xml" / f"{Path(name).stem}.xml", *things, size=(640, 480))
    again = convert(
        *(tmp_path, "voc", "--images", str(real_data / "bccd" / "images")),
        *("--annotations", str(tmp_path / "xml")),
    )
    assert flatten(again) == flatten(content)
