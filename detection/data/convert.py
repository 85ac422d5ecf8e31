"""Other annotations as COCO JSON: `python -m detection.data.convert voc|yolo|coco ...`.

Boxes are taken as LabelImg and most tools write them: corners in continuous pixels, from 0.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml
from PIL import ExifTags, Image

from detection.data.coco_json import read_sections, require
from detection.errors import UserError
from detection.files import write_json
from detection.images import PICTURE_SUFFIXES, SIDEWAYS
from detection.structures import Category

CORNERS = ("xmin", "ymin", "xmax", "ymax")
COCO_KEYS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}


class LabelledImage(NamedTuple):
    """One image as read.

    Args:
        file_name: path below the folder of the images, with /.
        size: (width, height).
        boxes: each a class name, x, y, width and height in pixels, and whether it is not to be
            counted: COCO's crowd.
    """

    file_name: str
    size: tuple[int, int]
    boxes: list[tuple[str, float, float, float, float, bool]]


class Problems(Counter[str]):
    """How often what went wrong, and the first case of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first_cases: dict[str, str] = {}

    def count(self, kind: str, case: object) -> None:
        self[kind] += 1
        self.first_cases.setdefault(kind, str(case))

    def describe(self) -> list[str]:
        return [f"{kind}: {n} (first: {self.first_cases[kind]})" for kind, n in self.items()]


def read_voc(images: Path, annotations: Path, problems: Problems) -> Iterator[LabelledImage]:
    """Pascal VOC: an XML file for each image, of the same name or naming it.

    Boxes marked `difficult` are kept as crowds: not trained on, and ignored in evaluation.

    Raises:
        UserError: a folder is missing or holds no XML files.
    """
    files = _find_files(annotations, {".xml"}, "XML files")
    pictures = _find_images(images, problems)
    for file in files:
        key = file.relative_to(annotations).with_suffix("").as_posix()
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            problems.count("XML files that cannot be read", f"{file.name}: {error}")
            continue
        named = PurePosixPath((root.findtext("filename") or "").strip())
        stem = named.with_suffix("").as_posix() if named.name else key
        if not (picture := pictures.get(key) or pictures.get(stem)):
            problems.count("annotations without an image", file.name)
            continue
        if not (found := _read_size(picture, problems)):
            continue
        size, orientation = found
        stated = tuple(_to_int(root.findtext(f"size/{side}")) for side in ("width", "height"))
        if stated == size[::-1] and orientation in SIDEWAYS:
            size = size[1], size[0]  # annotated as it is turned by its EXIF orientation
        elif stated != size:
            problems.count("sizes that are not the image's, which is taken", file.name)
        boxes = []
        for thing in root.iter("object"):
            name = (thing.findtext("name") or "").strip()
            corners = [_to_float(thing.findtext(f"bndbox/{key}")) for key in CORNERS]
            if not name or not all(map(math.isfinite, corners)):
                problems.count("boxes that cannot be read", file.name)
                continue
            x1, y1, x2, y2 = corners
            difficult = (thing.findtext("difficult") or "").strip() == "1"
            boxes.append((name, x1, y1, x2 - x1, y2 - y1, difficult))
        yield LabelledImage(picture.relative_to(images).as_posix(), size, boxes)


def read_yolo(
    images: Path, labels: Path, names: Sequence[str], problems: Problems
) -> Iterator[LabelledImage]:
    """YOLO: a text file for each image, of the same name; an image without one has no boxes.

    A line is a class number and centre, width and height as shares of the image; or a class number
    and the points of a polygon, of which the box is taken. Shares are of the image as a viewer
    shows it, turned as its EXIF orientation says.

    Raises:
        UserError: a folder is missing, or holds no images or text files.
    """
    pictures = _find_images(images, problems)
    for file in _find_files(labels, {".txt"}, "text files"):
        if file.relative_to(labels).with_suffix("").as_posix() not in pictures:
            problems.count("annotations without an image", file.name)
    for key, picture in pictures.items():
        if not (found := _read_size(picture, problems)):
            continue
        size, orientation = found
        if orientation in SIDEWAYS and size[0] != size[1]:
            # Of this size only the picture as shown is, and so the loader turns it.
            size, orientation = (size[1], size[0]), None
        file = labels / f"{key}.txt"
        try:
            text = file.read_text(encoding="utf-8-sig") if file.is_file() else ""
        except (OSError, UnicodeDecodeError):
            problems.count("text files that cannot be read, left out with their images", file.name)
            continue
        boxes = []
        for line in text.splitlines():
            words = line.split()
            numbers = [_to_float(word) for word in words]
            if not words:
                continue
            whole = math.isfinite(sum(numbers)) and numbers[0] == int(numbers[0])
            if not whole or not (len(words) in (5, 6) or (len(words) >= 7 and len(words) % 2)):
                problems.count("lines that cannot be read", f"{file.name}: {line[:60]}")
                continue
            if not 0 <= numbers[0] < len(names):
                problems.count(f"classes that are none of the {len(names)}", f"{file.name}: {line}")
                continue
            if len(words) <= 6:
                x, y, width, height = numbers[1:5]
                left, top = x - width / 2, y - height / 2
            else:
                left, top = min(numbers[1::2]), min(numbers[2::2])
                width, height = max(numbers[1::2]) - left, max(numbers[2::2]) - top
            shares = _turn_back((left, top, width, height), orientation)
            scaled = [value * side for value, side in zip(shares, 2 * size, strict=True)]
            boxes.append((names[int(numbers[0])], *scaled, False))
        yield LabelledImage(picture.relative_to(images).as_posix(), size, boxes)


def read_names(file: Path) -> list[str]:
    """Class names by number: of a YOLO data.yaml (`names`), or one a line.

    Raises:
        UserError: the file is missing or has none, or they are no texts.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else text.splitlines()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(names, dict):
        names = names.get("names")
    if isinstance(names, dict):
        if wrong := [key for key in names if not str(key).isdecimal()]:
            raise UserError(f"{file}: {wrong[0]!r} is no class number: number the names from 0")
        by_number = {int(key): name for key, name in names.items()}
        numbers = range(max(by_number, default=-1) + 1)
        names = [by_number.get(number, f"class {number}") for number in numbers]
    if not isinstance(names, list | None):
        raise UserError(f"{file}: the names are {names!r}: give a list, as in names: [cat, dog]")
    for number, name in enumerate(names or ()):
        # YAML takes an unquoted yes, no, on or off for a boolean, and a date for one.
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            raise UserError(f"{file}: class {number} is {name!r}, not a text: quote its name")
    names = [str(name).strip() for name in names or ()]
    while names and not names[-1]:  # the end of a text
        names.pop()
    if not names:
        raise UserError(f"{file} names no classes: give a data.yaml with names, or one name a line")
    if "" in names:
        raise UserError(f"{file}: class {names.index('')} has no name: give it one")
    return names


def to_coco(images: Sequence[LabelledImage], names: Sequence[str] | None = None) -> dict[str, Any]:
    """A COCO data set; category ids count from 1 in the order of `names`, or of the alphabet."""
    names = sorted({box[0] for image in images for box in image.boxes}) if names is None else names
    categories = [Category(i, name) for i, name in enumerate(names, start=1)]
    ids = {category.name: category.id for category in categories}
    annotations = [
        {
            "image_id": image_id,
            "category_id": ids[name],
            "bbox": [x, y, width, height],
            "area": width * height,
            "iscrowd": int(crowd),
        }
        for image_id, image in enumerate(images, start=1)
        for name, x, y, width, height, crowd in image.boxes
    ]
    return {
        "images": [
            {"id": i, "file_name": image.file_name, "width": image.size[0], "height": image.size[1]}
            for i, image in enumerate(images, start=1)
        ],
        "annotations": [{"id": i, **own} for i, own in enumerate(annotations, start=1)],
        "categories": [category._asdict() for category in categories],
    }


def select(content: dict[str, Any], image_ids: set[Any]) -> dict[str, Any]:
    """The part of a COCO data set with these images."""
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [own for own in content["annotations"] if own["image_id"] in image_ids],
    }


def choose_validation(content: dict[str, Any], share: float) -> set[Any]:
    """The ids of a share of the images, by chance and always the same for the same file names."""

    def draw(image: dict[str, Any]) -> bytes:
        return blake2b(image["file_name"].encode()).digest()

    ranked = sorted(content["images"], key=draw)
    return {image["id"] for image in ranked[: round(share * len(ranked))]}


def _find_files(folder: Path, suffixes: set[str] | frozenset[str], kind: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{folder} holds no {kind}")
    return files


def _find_images(folder: Path, problems: Problems) -> dict[str, Path]:
    """Every image by its path without the suffix."""
    pictures: dict[str, Path] = {}
    for file in _find_files(folder, PICTURE_SUFFIXES, "images"):
        key = file.relative_to(folder).with_suffix("").as_posix()
        if pictures.setdefault(key, file) is not file:
            case = f"{file.name} beside {pictures[key].name}"
            problems.count("images that differ from another in the suffix only: left out", case)
    return pictures


def _read_size(picture: Path, problems: Problems) -> tuple[tuple[int, int], int | None] | None:
    """(width, height) as stored, and the EXIF orientation."""
    try:
        with Image.open(picture) as image:
            # Pillow decodes a PNG to see whether its EXIF follows the pixels, where it seldom is.
            has_exif = image.format != "PNG" or "exif" in image.info
            exif = image.getexif() if has_exif else {}
            return image.size, exif.get(ExifTags.Base.Orientation)
    except Exception:  # Pillow answers a broken file with almost any exception.
        problems.count("images that cannot be read: left out", picture.name)
        return None


def _turn_back(
    box: tuple[float, float, float, float], orientation: int | None
) -> tuple[float, float, float, float]:
    """A box of an image as shown, in shares of the image as stored: x, y, width and height."""
    x, y, width, height = box
    if orientation in SIDEWAYS:
        x, y, width, height = y, x, height, width
    if orientation in (2, 3, 7, 8):
        x = 1 - x - width
    if orientation in (3, 4, 6, 7):
        y = 1 - y - height
    return x, y, width, height


def _to_float(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def _to_int(text: str | None) -> int:
    value = _to_float(text)
    return int(value) if math.isfinite(value) else -1


def _find_listed(file: Path, images: Sequence[dict[str, Any]], problems: Problems) -> set[Any]:
    """The ids of a list's images: names or paths, with or without suffix, first on their lines.

    A path means the image that shares most of its parts from the end on.

    Raises:
        UserError: the list cannot be read, or a line means several images.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    by_end: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for image in images:
        parts = _reverse(image["file_name"])
        for n in range(1, len(parts) + 1):
            by_end[parts[:n]].append(image)
    listed: set[Any] = set()
    for line in filter(None, map(str.strip, lines)):
        name = line if _reverse(line)[:1] in by_end else line.split()[0]  # it may hold spaces
        parts = _reverse(name)
        ends = (parts[:n] for n in range(len(parts), 0, -1))
        end = next((end for end in ends if end in by_end), ())
        # An image of that name in another folder is another one.
        found = [
            image
            for image in by_end.get(end, [])
            if len(end) in (len(parts), len(_reverse(image["file_name"])))
        ]
        found = [image for image in found if name.endswith(image["file_name"])] or found
        if not found:
            problems.count("listed images that are not there", name)
        if len(names := sorted({image["file_name"] for image in found})) > 1:
            raise UserError(
                f"{file}: {name} may be {names[0]} or {names[1]}: list it as one of them"
            )
        listed.update(image["id"] for image in found)
    return listed


def _reverse(name: str) -> tuple[str, ...]:
    """The parts of a path from the end on, the file's without the suffix of a picture."""
    path = Path(name)
    known = path.suffix.lower() in PICTURE_SUFFIXES
    return (path.with_suffix("") if known else path).parts[::-1]


def _read_content(options: argparse.Namespace, problems: Problems) -> dict[str, Any]:
    if options.format == "voc":
        names = options.classes.split(",") if options.classes else None
        images = list(read_voc(options.images, options.annotations, problems))
        if names is not None:
            for image in images:
                for box in image.boxes:
                    if box[0] not in names:
                        problems.count("boxes of other classes: left out", box[0])
            images = [
                image._replace(boxes=[box for box in image.boxes if box[0] in names])
                for image in images
            ]
        return to_coco(images, names)
    if options.format == "yolo":
        names = read_names(options.names)
        return to_coco(list(read_yolo(options.images, options.labels, names, problems)), names)
    content = read_sections(options.annotations)
    for section, types in COCO_KEYS.items():
        for place, record in enumerate(content[section]):
            require(options.annotations, record, f"{section}[{place}]", **types)
    return content


def _write(content: dict[str, Any], path: Path) -> None:
    try:
        write_json(content, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    names = {category["id"]: category["name"] for category in content["categories"]}
    counts = Counter(names.get(own["category_id"]) for own in content["annotations"])
    boxes = ", ".join(f"{name} {counts[name]}" for name in names.values())
    print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes: {boxes}")


def _check_outputs(options: argparse.Namespace) -> None:
    if not 0 < options.val_share < 1:
        raise UserError(f"--val-share {options.val_share}: give a share between 0 and 1")
    paths = [options.output, options.val_output]
    if options.format == "coco":
        paths.append(options.annotations)
    given = [path.resolve() for path in paths if path]
    if len(set(given)) < len(given):
        raise UserError("--output, --val-output and what is read must be different files")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.data.convert",
        description="Write annotations as COCO JSON, whole, or as training and validation parts.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="voc|yolo|coco")
    voc = formats.add_parser("voc", help="Pascal VOC: an XML file for each image")
    yolo = formats.add_parser("yolo", help="YOLO: a text file for each image")
    coco = formats.add_parser("coco", help="a COCO JSON that is only to be parted")
    for command in (voc, yolo):
        command.add_argument("--images", type=Path, required=True, help="the folder of the images")
    voc.add_argument("--annotations", type=Path, required=True, help="the folder of the XML files")
    voc.add_argument("--classes", help="take these only, in this order: a,b,c (default: all)")
    yolo.add_argument("--labels", type=Path, required=True, help="the folder of the text files")
    yolo.add_argument("--names", type=Path, required=True, help="data.yaml, or one name a line")
    coco.add_argument("--annotations", type=Path, required=True, help="the JSON")
    for command in (voc, yolo, coco):
        command.add_argument("--output", type=Path, required=True, help="the JSON to write")
        command.add_argument("--list", type=Path, help="a file with the images to take, one a line")
        command.add_argument("--val-output", type=Path, help="put a part of the images there")
        command.add_argument("--val-share", type=float, default=0.2, help="which (default: 0.2)")
    options = parser.parse_args(arguments)
    problems = Problems()
    try:
        _check_outputs(options)
        content = _read_content(options, problems)
        if options.list:
            content = select(content, _find_listed(options.list, content["images"], problems))
        if not content["images"]:
            raise UserError("no image is left: see that annotations and images have the same names")
        if options.val_output:
            chosen = choose_validation(content, options.val_share)
            num_images = len(content["images"])
            if not 0 < len(chosen) < num_images:
                raise UserError(
                    f"--val-share {options.val_share} puts {len(chosen)} of {num_images} images "
                    "aside: give one that leaves images in both parts"
                )
            _write(select(content, chosen), options.val_output)
            content = select(content, {image["id"] for image in content["images"]} - chosen)
        _write(content, options.output)
    except UserError as error:
        sys.exit(f"error: {error}")
    for line in problems.describe():
        print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
