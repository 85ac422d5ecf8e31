"""COCO annotations: read, checked and indexed once.

Shapes: N boxes of one image, M annotations of the whole split.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detection.errors import UserError
from detection.structures import Category

# Far beyond any pixel coordinate; also False for NaN, infinity and integers no float can hold.
_COORDINATE_LIMIT = 1e9
# Pillow opens no larger image: what states a larger one is wrong.
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
# Control characters and halves of surrogate pairs, which could upset a terminal or a file system.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class CocoIndex:
    """One split of a COCO-format data set, made by `CocoIndex.load`.

    Attributes:
        images_dir: the folder that `file_names` are relative to.
        annotations_file: the JSON it was read from.
        categories: the category table sorted by id; a category's place is its label.
        image_ids: the data set's own id of each image, in the JSON's order.
        file_names: the file of each image.
        sizes: (height, width) of each image, as the JSON states them.
        problems: how many records were dropped, clipped or repaired, by kind.
        first_cases: the first record of each kind of problem.
    """

    def __init__(self, images_dir: Path, annotations_file: Path) -> None:
        self.images_dir = images_dir
        self.annotations_file = annotations_file
        self.categories: tuple[Category, ...] = ()
        self.image_ids: list[int] = []
        self.file_names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.problems: Counter[str] = Counter()
        self.first_cases: dict[str, str] = {}

    @classmethod
    def load(
        cls, *, images: str | Path, annotations: str | Path, ids: str | Path | None = None
    ) -> CocoIndex:
        """Reads and checks a split.

        Args:
            images: the folder of the images. No file name leads out of it; links inside of it are
                followed, since who made the folder made them.
            annotations: a COCO JSON with `images`, `annotations` and `categories`.
            ids: a text file with one image id a line, or a JSON list of ids: only these images.

        Raises:
            UserError: a file or folder is missing, or the JSON cannot describe a data set. Single
                broken annotations do not raise: they are left out and counted in `problems`.
        """
        index = cls(Path(images), Path(annotations))
        content = _read_json(index.annotations_file)
        if not index.images_dir.is_dir():
            raise UserError(f"{images}: no such folder of images")
        if not isinstance(content, dict):
            raise UserError(f"{annotations} is not in COCO format: its top level is not an object")
        for section in ("images", "annotations", "categories"):
            if not isinstance(content.get(section), list):
                raise UserError(f'{annotations} is not in COCO format: it has no list "{section}"')
        index._read_categories(content["categories"])
        known_ids = index._read_images(content["images"], Path(ids) if ids else None)
        index._read_annotations(content["annotations"], known_ids)
        return index

    def __len__(self) -> int:
        return len(self.image_ids)

    def boxes(self, i: int) -> Tensor:
        """(N, 4) float32 xyxy in pixels of image `i`, clipped to it, without crowds."""
        return torch.from_numpy(self._boxes[self._offsets[i] : self._offsets[i + 1]].copy())

    def labels(self, i: int) -> Tensor:
        """(N,) int64 labels of `boxes(i)`, contiguous from 0."""
        return torch.from_numpy(self._labels[self._offsets[i] : self._offsets[i + 1]].copy())

    def describe(self) -> list[str]:
        """A printable line for each kind of problem."""
        return [
            f"{self.annotations_file.name}: {kind}: {count} (first: {self.first_cases[kind]})"
            for kind, count in self.problems.items()
        ]

    def ground_truth(self) -> dict[str, Any]:
        """The split as a COCO dict for pycocotools.

        Crowds are in it and boxes are as the JSON gives them; broken ones are left out. Annotation
        ids count from 1, because pycocotools reads a match with id 0 as no match.
        """
        columns = (self._owners, self._bboxes, self._areas, self._crowds, self._all_labels)
        return {
            "images": [
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
                for image_id, file_name, (height, width) in zip(
                    self.image_ids, self.file_names, self.sizes, strict=True
                )
            ],
            "categories": [category._asdict() for category in self.categories],
            "annotations": [
                {
                    "id": number,
                    "image_id": self.image_ids[owner],
                    "category_id": self.categories[label].id,
                    "bbox": bbox,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for number, (owner, bbox, area, crowd, label) in enumerate(
                    zip(*(column.tolist() for column in columns), strict=True), start=1
                )
            ],
        }

    def _count(self, kind: str, case: str, count: int = 1) -> None:
        self.problems[kind] += count
        self.first_cases.setdefault(kind, case)

    def _read_categories(self, records: list[Any]) -> None:
        for place, record in enumerate(records):
            self._require(record, f"category {place}", id=int, name=str)
        if not records:
            raise UserError(f"{self.annotations_file}: the category table is empty")
        for key in ("id", "name"):
            self._require_unique((record[key] for record in records), f"categories have the {key}")
        self.categories = tuple(
            sorted(Category(id=record["id"], name=record["name"]) for record in records)
        )

    def _read_images(self, records: list[Any], ids_file: Path | None) -> set[int]:
        """Returns the ids of all images in the JSON, those that `ids_file` leaves out included."""
        for place, record in enumerate(records):
            self._require(record, f"image {place}", id=int, file_name=str)
            path = PurePath(record["file_name"])
            if not path.name or path.anchor or ".." in path.parts:
                raise UserError(
                    f"{self.annotations_file}: image {record['id']} has the file_name "
                    f"{record['file_name']!r}, which is no file inside the image folder"
                )
        self._require_unique((record["id"] for record in records), "images have the id")
        known_ids = {record["id"] for record in records}
        if ids_file is not None:
            wanted = _read_ids(ids_file)
            if unknown := sorted(wanted - known_ids):
                raise UserError(
                    f"{ids_file}: {len(unknown)} of its ids are not in {self.annotations_file} "
                    f"(first: {unknown[0]})"
                )
            records = [record for record in records if record["id"] in wanted]
        if not records:
            raise UserError(f"{ids_file or self.annotations_file}: it names no images")
        self.image_ids = [record["id"] for record in records]
        self.file_names = [record["file_name"] for record in records]
        if missing := _find_missing(self.images_dir, self.file_names):
            raise UserError(
                f"{self.images_dir} lacks {len(missing)} of the {len(records)} images that "
                f"{self.annotations_file} lists (first: {missing[0]!r}): is it the right folder?"
            )
        self.sizes = [self._read_size(record) for record in records]
        return known_ids

    def _read_size(self, record: dict[str, Any]) -> tuple[int, int]:
        height, width = (record.get(key) for key in ("height", "width"))
        if (
            _is_number(height)
            and _is_number(width)
            and min(height, width) >= 1
            and height * width <= _MAX_PIXELS
        ):
            return int(height), int(width)
        self._count(
            "images without a possible width and height, read from the file",
            f"image {record['id']}",
        )
        try:
            with Image.open(self.images_dir / record["file_name"]) as image:
                return image.height, image.width
        except (OSError, Image.DecompressionBombError):
            raise UserError(
                f"{self.annotations_file}: image {record['id']} has no possible width and height, "
                f"and {record['file_name']!r} cannot be read to find them"
            ) from None

    def _read_annotations(self, records: list[Any], known_ids: set[int]) -> None:
        places = {image_id: place for place, image_id in enumerate(self.image_ids)}
        labels = {category.id: label for label, category in enumerate(self.categories)}
        taken_ids: set[int] = set()
        names: list[str] = []
        rows: list[tuple[int, int, bool, float, list[float]]] = []
        for place, record in enumerate(records):
            self._require(record, f"annotation {place}", image_id=object, category_id=object)
            name = f"annotation {record['id']!r}" if "id" in record else f"annotation at {place}"
            image_id, category_id = record["image_id"], record["category_id"]
            if not isinstance(image_id, int) or image_id not in known_ids:
                self._count("annotations of unknown images, dropped", f"{name}, image {image_id!r}")
                continue
            if image_id not in places:
                continue
            if not isinstance(category_id, int) or category_id not in labels:
                self._count(
                    "annotations of unknown categories, dropped",
                    f"{name}, category {category_id!r}",
                )
                continue
            bbox = record.get("bbox")
            if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))):
                self._count("boxes that are not four finite numbers, dropped", name)
                continue
            if bbox[2] <= 0 or bbox[3] <= 0:
                self._count("boxes with no area, dropped", name)
                continue
            own_id = record.get("id")
            if not isinstance(own_id, int):
                self._count("annotations without a whole number as id, numbered", name)
            elif own_id in taken_ids:
                self._count("annotations with the id of another, numbered", name)
            else:
                taken_ids.add(own_id)
            crowd, area = record.get("iscrowd"), record.get("area")
            if crowd not in (0, 1):
                self._count("annotations without iscrowd, taken as 0", name)
            if not _is_number(area) or area < 0:
                self._count("annotations without area, taken as that of the box", name)
                area = bbox[2] * bbox[3]
            names.append(name)
            rows.append((places[image_id], labels[category_id], crowd == 1, area, bbox))
        self._store(names, rows)

    def _store(
        self, names: list[str], rows: list[tuple[int, int, bool, float, list[float]]]
    ) -> None:
        """Keeps the annotations that touch their image, in flat arrays sorted by image."""
        owners = np.array([row[0] for row in rows], np.int64)
        bboxes = np.array([row[4] for row in rows], np.float64).reshape(-1, 4)  # (M, 4) xywh
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
            if mask.any():
                self._count(kind, names[int(mask.argmax())], int(mask.sum()))

        order = np.flatnonzero(kept)
        order = order[np.argsort(owners[order], kind="stable")]
        self._owners, self._bboxes = owners[order], bboxes[order]
        self._all_labels = np.array([row[1] for row in rows], np.int64)[order]
        self._crowds = np.array([row[2] for row in rows], bool)[order]
        self._areas = np.array([row[3] for row in rows], np.float64)[order]

        single = ~self._crowds
        self._boxes = clipped[order][single]
        self._labels = self._all_labels[single]
        self._offsets = np.searchsorted(self._owners[single], np.arange(len(self) + 1))

    def _require(self, record: Any, which: str, **types: type) -> None:
        fault = f"{self.annotations_file} is not in COCO format: {which}"
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

    def _require_unique(self, values: Iterable[int | str], what: str) -> None:
        (value, count), *_ = Counter(values).most_common(1) or [(None, 0)]
        if count > 1:
            raise UserError(f"{self.annotations_file}: {count} {what} {value!r}; make them differ")


def check_same_categories(train: CocoIndex, val: CocoIndex) -> None:
    """Raises UserError, naming the first difference, if two splits number classes differently."""
    if train.categories == val.categories:
        return
    only_train = [c for c in train.categories if c not in val.categories]
    only_val = [c for c in val.categories if c not in train.categories]
    found, holder, other = (only_train[0], train, val) if only_train else (only_val[0], val, train)
    raise UserError(
        f"{holder.annotations_file} has the category {found.id} {found.name!r}, "
        f"{other.annotations_file} has not: both need the same category table"
    )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and abs(value) < _COORDINATE_LIMIT


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
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


def _find_missing(folder: Path, file_names: list[str]) -> list[str]:
    """One listing per folder, since asking for each file is slow on network file systems."""
    listings: dict[str, set[str]] = {}
    for parent in {os.path.dirname(file_name) for file_name in file_names}:
        try:
            with os.scandir(folder / parent) as entries:
                listings[parent] = {entry.name for entry in entries}
        except OSError:
            listings[parent] = set()
    return [
        file_name
        for file_name in file_names
        if os.path.basename(file_name) not in listings[os.path.dirname(file_name)]
    ]
