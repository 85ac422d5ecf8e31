"""COCO JSON into flat arrays, every record checked.

Shapes: M annotations of the whole split, N of them not crowds.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detection.data.columns import Texts
from detection.errors import UserError
from detection.structures import Category

# Far beyond any pixel coordinate; also False for NaN, infinity and integers no float can hold.
_COORDINATE_LIMIT = 1e9
# Pillow opens no larger image: what states a larger one is wrong.
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
# Control characters and halves of surrogate pairs, which could upset a terminal or a file system.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# An annotation: its place in the JSON, that of its image, and the rest.
Row = tuple[int, int, int, bool, float, list[float]]
_ROW = np.dtype(
    [
        ("place", np.int64),
        ("owner", np.int64),
        ("label", np.int64),
        ("crowd", np.bool_),
        ("area", np.float64),
        ("bbox", np.float64, 4),
    ]
)
UNSTATED_SIZES = "images without a possible width and height, read from the file"


class CocoReader:
    """Reads one split; the errors are those of `CocoIndex.load`.

    Args:
        images_dir, annotations_file, ids_file: as `CocoIndex.load` takes them.
        lenient: repeated ids and unreadable images, which training cannot work with, are counted
            as the other problems are, so that a report can hold them all; missing images are not
            looked for.

    Attributes:
        cases: every record of each kind of problem.
    """

    def __init__(
        self,
        images_dir: Path,
        annotations_file: Path,
        ids_file: Path | None = None,
        *,
        lenient: bool = False,
    ) -> None:
        self.images_dir = images_dir
        self.annotations_file = annotations_file
        self.ids_file = ids_file
        self.lenient = lenient
        self.cases: dict[str, list[str]] = {}

    def read(self) -> dict[str, Any]:
        """Tensors and plain values, which `CocoIndex` takes."""
        with _no_garbage_collection():
            content = read_sections(self.annotations_file)
            self._read_categories(content["categories"])
            known_ids = self._read_images(content["images"])
            annotations = self._read_annotations(content["annotations"], known_ids)
        return {
            "categories": [tuple(category) for category in self.categories],
            "image_ids": torch.tensor(self.image_ids),
            "file_names": Texts.pack(self.file_names).content,
            "sizes": torch.tensor(self.sizes),
            "problems": {kind: len(cases) for kind, cases in self.cases.items()},
            "first_cases": {kind: cases[0] for kind, cases in self.cases.items()},
            **annotations,
        }

    def _count(self, kind: str, case: str) -> None:
        self.cases.setdefault(kind, []).append(case)

    def _refuse(self, kind: str, case: str, error: str) -> None:
        if not self.lenient:
            raise UserError(f"{self.annotations_file}: {error}") from None
        self._count(kind, case)

    def _read_categories(self, records: list[Any]) -> None:
        for place, record in enumerate(records):
            require(self.annotations_file, record, f"category {place}", id=int, name=str)
        if not records:
            raise UserError(f"{self.annotations_file}: the category table is empty")
        for key in ("id", "name"):
            self._require_unique(records, "categories", key)
        self.categories = tuple(
            sorted(Category(id=record["id"], name=record["name"]) for record in records)
        )

    def _read_images(self, records: list[Any]) -> set[int]:
        """Returns the ids of all images in the JSON, those that `ids_file` leaves out included."""
        for place, record in enumerate(records):
            require(self.annotations_file, record, f"image {place}", id=int, file_name=str)
            path = PurePath(record["file_name"])
            if not path.name or path.anchor or ".." in path.parts:
                raise UserError(
                    f"{self.annotations_file}: image {record['id']} has the file_name "
                    f"{record['file_name']!r}, which is no file inside the image folder"
                )
        self._require_unique(records, "images", "id")
        known_ids = {record["id"] for record in records}
        if self.ids_file is not None:
            wanted = _read_ids(self.ids_file)
            if unknown := sorted(wanted - known_ids):
                raise UserError(
                    f"{self.ids_file}: {len(unknown)} of its ids are not in "
                    f"{self.annotations_file} (first: {unknown[0]})"
                )
            records = [record for record in records if record["id"] in wanted]
        if not records:
            raise UserError(f"{self.ids_file or self.annotations_file}: it names no images")
        file_names = [] if self.lenient else [record["file_name"] for record in records]
        check_files(self.images_dir, file_names, self.annotations_file)
        sized = [(record, size) for record in records if (size := self._read_size(record))]
        if not sized:
            raise UserError(
                f"{self.images_dir}: no image that {self.annotations_file} lists can be read: "
                "is it the right folder?"
            )
        self.image_ids = [record["id"] for record, _ in sized]
        self.file_names = [record["file_name"] for record, _ in sized]
        self.sizes = [size for _, size in sized]
        return known_ids

    def _read_size(self, record: dict[str, Any]) -> tuple[int, int] | None:
        height, width = (record.get(key) for key in ("height", "width"))
        if (
            _is_number(height)
            and _is_number(width)
            and min(height, width) >= 1
            and height * width <= _MAX_PIXELS
        ):
            return int(height), int(width)
        try:
            with Image.open(self.images_dir / record["file_name"]) as image:
                size = image.height, image.width
        except Exception:  # Pillow answers a broken file with almost any
            fault = f"image {record['id']} has no possible width and height"
            self._refuse(
                "images of unstated size that cannot be read to find it, left out",
                f"{record['file_name']}: {fault}",
                f"{fault}, and {record['file_name']!r} cannot be read to find them",
            )
            return None
        self._count(UNSTATED_SIZES, f"image {record['id']}")
        return size

    def _read_annotations(self, records: list[Any], known_ids: set[int]) -> dict[str, Tensor]:
        places = {image_id: place for place, image_id in enumerate(self.image_ids)}
        labels = {category.id: label for label, category in enumerate(self.categories)}
        taken_ids: set[int] = set()
        rows: list[Row] = []

        def name(place: int) -> str:
            record = records[place]
            return f"annotation {record['id']!r}" if "id" in record else f"annotation at {place}"

        for place, record in enumerate(records):
            if not (isinstance(record, dict) and "image_id" in record and "category_id" in record):
                keys = {"image_id": object, "category_id": object}
                require(self.annotations_file, record, f"annotation {place}", **keys)
            image_id, category_id = record["image_id"], record["category_id"]
            owner = places.get(image_id) if isinstance(image_id, int) else None
            if owner is None:
                if not isinstance(image_id, int) or image_id not in known_ids:
                    self._count(
                        "annotations of unknown images, dropped",
                        f"{name(place)}, image {_describe_id(image_id)}",
                    )
                continue
            label = labels.get(category_id) if isinstance(category_id, int) else None
            if label is None:
                self._count(
                    "annotations of unknown categories, dropped",
                    f"{name(place)}, category {_describe_id(category_id)}",
                )
                continue
            bbox = record.get("bbox")
            if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))):
                self._count("boxes that are not four finite numbers, dropped", name(place))
                continue
            if bbox[2] <= 0 or bbox[3] <= 0:
                self._count("boxes with no area, dropped", name(place))
                continue
            own_id = record.get("id")
            if not isinstance(own_id, int):
                self._count("annotations without a whole number as id, numbered", name(place))
            elif own_id in taken_ids:
                self._count("annotations with the id of another, numbered", name(place))
            else:
                taken_ids.add(own_id)
            crowd, area = record.get("iscrowd"), record.get("area")
            if crowd not in (0, 1):
                self._count("annotations without iscrowd, taken as 0", name(place))
            if not _is_number(area) or area < 0:
                self._count("annotations without area, taken as that of the box", name(place))
                area = bbox[2] * bbox[3]
            rows.append((place, owner, label, crowd == 1, area, bbox))
        return self._flatten(rows, name)

    def _flatten(self, rows: list[Row], name: Callable[[int], str]) -> dict[str, Tensor]:
        """The annotations that touch their image, in flat arrays sorted by image."""
        table = np.array(rows, _ROW)
        owners, bboxes = table["owner"], table["bbox"]  # (M,), (M, 4) xywh
        heights_widths = np.array(self.sizes, np.float32)[owners]  # (M, 2)
        # In float32, as they are trained on: a box may lose its area only by that rounding.
        corners = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], 1)
        boxes = corners.astype(np.float32)
        clipped = boxes.clip(0, heights_widths[:, [1, 0, 1, 0]])
        kept = (clipped[:, 2:] > clipped[:, :2]).all(1)
        cut = kept & (clipped != boxes).any(1)
        for kind, mask in (
            ("boxes outside of their image, dropped", ~kept),
            ("boxes over the edge of their image, clipped for training", cut),
        ):
            for place in table["place"][mask].tolist():
                self._count(kind, name(place))

        order = np.flatnonzero(kept)
        order = order[np.argsort(owners[order], kind="stable")]
        table = table[order]
        single = ~table["crowd"]
        arrays = {
            **{key: table[key] for key in ("owner", "bbox", "area", "crowd", "label")},
            "boxes": clipped[order][single],
            "labels": table["label"][single],
            "offsets": np.searchsorted(table["owner"][single], np.arange(len(self.sizes) + 1)),
        }
        return {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}

    def _require_unique(self, records: list[Any], section: str, key: str) -> None:
        for value, count in Counter(record[key] for record in records).most_common():
            if count == 1:
                break
            case = f"{count} {section} have the {key} {value!r}"
            self._refuse(f"{key}s of several {section}", case, f"{case}; make them differ")


def read_sections(file: Path) -> dict[str, list[Any]]:
    """The images, annotations and categories of a COCO JSON, as they are.

    Raises:
        UserError: the file cannot be read, or lacks one of the three.
    """
    content = _read_json(file)
    fault = f"{file} is not in COCO format"
    if not isinstance(content, dict):
        raise UserError(f"{fault}: its top level is not an object")
    keys = ("images", "annotations", "categories")
    for key in keys:
        if not isinstance(content.get(key), list):
            raise UserError(f'{fault}: it has no list "{key}"')
    return {key: content[key] for key in keys}


def require(file: Path, record: Any, which: str, **types: type) -> None:
    """Raises UserError where a record of a COCO JSON lacks a key, or has it of another type."""
    fault = f"{file} is not in COCO format: {which}"
    if not isinstance(record, dict):
        raise UserError(f"{fault} is not an object")
    for key, kind in types.items():
        if key not in record:
            raise UserError(f'{fault} has no "{key}"')
        value = record[key]
        if not isinstance(value, kind):
            found = str(value)[:40]
            raise UserError(f'{fault} has "{key}" {found!r}, which is not {kind.__name__}')
        if kind is int and not -(2**63) <= value < 2**63:
            raise UserError(f'{fault} has an "{key}" of more than 64 bits')
        if kind is str and _UNPRINTABLE.search(value):
            raise UserError(f'{fault} has "{key}" {value!r}: take the control characters out')


def _describe_id(value: Any) -> str:
    kind = "a text" if isinstance(value, str) else f"a {type(value).__name__}"
    return f"{value!r}" if isinstance(value, int) else f"{value!r} is {kind}; ids are whole numbers"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and abs(value) < _COORDINATE_LIMIT


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: it is not a text file") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:  # a ValueError also for thousands of digits
        raise UserError(f"{file}: it is not JSON ({error})") from None


def _read_ids(file: Path) -> set[int]:
    text = _read_text(file)
    values = _read_json(file) if text.lstrip().startswith("[") else text.split()
    try:
        return {int(value) for value in values}
    except (TypeError, ValueError):
        raise UserError(f"{file}: it is not a list of image ids, one a line") from None


def check_files(images_dir: Path, file_names: Collection[str], annotations_file: Path) -> None:
    """Raises UserError where the folder or images are not there.

    One listing per folder, since asking for each file is slow on network file systems.
    """
    if not images_dir.is_dir():
        raise UserError(f"{images_dir}: no such folder of images")
    listings: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        parent, name = os.path.split(file_name)
        if parent not in listings:
            try:
                listings[parent] = set(os.listdir(images_dir / parent))
            except OSError:
                listings[parent] = set()
        if name not in listings[parent]:
            missing.append(file_name)
    if missing:
        hint = "is it the right folder?"
        if "\\" in missing[0]:
            hint = "write / for the backslashes"
        raise UserError(
            f"{images_dir} lacks {len(missing)} of the {len(file_names)} images that "
            f"{annotations_file} lists (first: {missing[0]!r}): {hint}"
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of new objects would start it again and again, and none of them is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
