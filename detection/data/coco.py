"""A split of a COCO data set: its images and boxes, parsed once and shared by all processes.

Shapes: N boxes of one image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from detection.data.coco_json import UNSTATED_SIZES, CocoReader, check_files
from detection.data.columns import Column, Texts
from detection.data.index_cache import IndexCache
from detection.errors import UserError
from detection.images import load_annotated_image
from detection.structures import Category


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

    def __init__(self, images_dir: Path, annotations_file: Path, content: dict[str, Any]) -> None:
        self.images_dir = images_dir
        self.annotations_file = annotations_file
        self.categories = tuple(Category(*category) for category in content["categories"])
        self.image_ids = Column(content["image_ids"], int)
        self.file_names = Texts(content["file_names"])
        self.sizes = Column(content["sizes"], _to_size)
        self.problems: dict[str, int] = content["problems"]
        self.first_cases: dict[str, str] = content["first_cases"]
        self._content = content

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
        images_dir, annotations_file = Path(images), Path(annotations)
        ids_file = Path(ids) if ids else None
        cache = IndexCache(images_dir, [annotations_file, *([ids_file] if ids_file else [])])
        content = cache.read()
        if content is not None:
            index = cls(images_dir, annotations_file, content)
            check_files(images_dir, index.file_names, annotations_file)
            return index
        content = CocoReader(images_dir, annotations_file, ids_file).read()
        if UNSTATED_SIZES not in content["problems"]:  # their sizes depend on the images as well
            cache.write(content)
        return cls(images_dir, annotations_file, content)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def names(self) -> list[str]:
        """The class names by label."""
        return [category.name for category in self.categories]

    def image_path(self, i: int) -> Path:
        """The file of image `i`."""
        return self.images_dir / self.file_names[i]

    def load_image(self, i: int, *, least_side: int | None = None) -> Image.Image:
        """Image `i`, as `load_annotated_image` gives it.

        Raises:
            UnreadableImage: with the reason.
        """
        return load_annotated_image(self.image_path(i), self.sizes[i], least_side=least_side)

    def boxes(self, i: int) -> Tensor:
        """(N, 4) float32 xyxy in pixels of image `i`, clipped to it, without crowds."""
        return self._content["boxes"][self._rows(i)].clone()

    def labels(self, i: int) -> Tensor:
        """(N,) int64 labels of `boxes(i)`, contiguous from 0."""
        return self._content["labels"][self._rows(i)].clone()

    def count_boxes(self) -> Tensor:
        """(images,) int64: N of each image."""
        return self._content["offsets"].diff()

    def describe(self, max_boxes: int | None = None) -> list[str]:
        """A printable line for each kind of problem.

        Args:
            max_boxes: training takes at most so many boxes of an image; None where there is none.
        """
        lines = [
            f"{self.annotations_file.name}: {kind}: {count} (first: {self.first_cases[kind]})"
            for kind, count in self.problems.items()
        ]
        if not len(self._content["labels"]):
            lines.append(f"{self.annotations_file.name}: there are no boxes to find")
        counts = self.count_boxes()
        if max_boxes is not None and (num_crowded := int((counts > max_boxes).sum())):
            lines.append(
                f"{self.annotations_file.name}: {num_crowded} images have more than "
                f"max_boxes={max_boxes} boxes (most: {counts.max()}): raise "
                "data.augmentation.max_boxes"
            )
        return lines

    def ground_truth(self) -> dict[str, Any]:
        """The split as a COCO dict for pycocotools.

        Crowds are in it and boxes are as the JSON gives them; broken ones are left out. Annotation
        ids count from 1, because pycocotools reads a match with id 0 as no match.
        """
        image_ids = list(self.image_ids)
        columns = (self._content[key] for key in ("owner", "bbox", "area", "crowd", "label"))
        return {
            "images": [
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
                for image_id, file_name, (height, width) in zip(
                    image_ids, self.file_names, self.sizes, strict=True
                )
            ],
            "categories": [category._asdict() for category in self.categories],
            "annotations": [
                {
                    "id": number,
                    "image_id": image_ids[owner],
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

    def _rows(self, i: int) -> slice:
        return slice(*self._content["offsets"][i : i + 2].tolist())


def check_trainable(train: CocoIndex) -> None:
    """Raises UserError where a split has annotations but none to train on."""
    if train.count_boxes().any():
        return
    given = [line for line in train.describe() if "dropped: " in line]
    if train.ground_truth()["annotations"]:
        given.append(f"{train.annotations_file.name}: its boxes are all crowds")
    if given:
        raise UserError(f"no annotation is left to train on: {given[0]}")


def check_same_categories(train: CocoIndex, val: CocoIndex) -> None:
    """Raises UserError, naming the first difference, if two splits number classes differently."""
    if train.categories == val.categories:
        return
    only_train = [c for c in train.categories if c not in val.categories]
    only_val = [c for c in val.categories if c not in train.categories]
    found, holder, other = (only_train[0], train, val) if only_train else (only_val[0], val, train)
    same_name = [category.id for category in other.categories if category.name == found.name]
    has = f"has it as id {same_name[0]}" if same_name else "has not"
    raise UserError(
        f"{holder.annotations_file} has the category {found.id} {found.name!r}, "
        f"{other.annotations_file} {has}: both need the same category table"
    )


def _to_size(height_width: list[int]) -> tuple[int, int]:
    height, width = height_width
    return height, width
