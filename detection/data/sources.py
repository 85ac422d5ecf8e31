"""The data sets that configs name: where the files of each split lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detection.data.coco import CocoIndex
from detection.errors import UserError


class SplitFiles(NamedTuple):
    """The files of one split.

    Args:
        images: the folder of the images.
        annotations: the COCO JSON.
        ids: a file with the image ids to take; None takes all.
    """

    images: Path
    annotations: Path
    ids: Path | None = None


class Splits(NamedTuple):
    """The files of a data set; `train` is None where only evaluation is possible."""

    train: SplitFiles | None
    val: SplitFiles


def coco(*, root: str | Path | None, train: Mapping[str, Any], val: Mapping[str, Any]) -> Splits:
    """The official COCO layout: `<split>/` and `annotations/instances_<split>.json` under `root`.

    Args:
        root: the folder of the data set.
        train, val: `split`, a name such as "train2017", and `ids`, a file of image ids or None.
    """
    if root is None:
        raise UserError(
            "data.root is not set: give the folder that holds "
            f"{train['split']}/, {val['split']}/ and annotations/"
        )
    if not Path(root).is_dir():
        raise UserError(f"data.root={root}: no such folder")

    def find(split: str, ids: str | Path | None) -> SplitFiles:
        annotations = Path(root) / "annotations" / f"instances_{split}.json"
        return SplitFiles(Path(root) / split, annotations, Path(ids) if ids else None)

    return Splits(find(**train), find(**val))


def custom(*, train: Mapping[str, Any], val: Mapping[str, Any]) -> Splits:
    """Any data set in COCO format: `images`, `annotations` and `ids` (or None) of each split.

    `train` may be unset as a whole, which is enough to evaluate.
    """
    train_files = _find_custom("train", **train) if any(train.values()) else None
    return Splits(train_files, _find_custom("val", **val))


def shapes(*, root: str | Path | None = None, **recipe: Any) -> Splits:
    """The embedded set, drawn on first use.

    Args:
        root: the folder to keep it in; the user's cache folder if None.
        recipe: fields of `detection.data.shapes.Recipe`.
    """
    # Nothing else needs the drawing code.
    from detection.data.shapes import Recipe, provide

    folder = provide(Recipe(**recipe), root)
    return Splits(
        *(
            SplitFiles(folder / "images" / name, folder / "annotations" / f"instances_{name}.json")
            for name in ("train", "val")
        )
    )


def find_split(splits: Splits, name: str) -> SplitFiles | None:
    """The split that a config's `split` names.

    Raises:
        UserError: there is no such split.
    """
    if name not in Splits._fields:
        raise UserError(f"split={name}: give one of {', '.join(Splits._fields)}")
    return getattr(splits, name)


def data_source(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` section without what is only of training."""
    return {key: value for key, value in config.items() if key not in ("augmentation", "shrink")}


def load_split(files: SplitFiles | None) -> CocoIndex:
    """Reads the annotations of a split.

    Raises:
        UserError: the split is not set, or its files are wrong.
    """
    if files is None:
        raise UserError("data.train is not set: give data.train.images and data.train.annotations")
    return CocoIndex.load(**files._asdict())


def _find_custom(
    name: str,
    *,
    images: str | Path | None,
    annotations: str | Path | None,
    ids: str | Path | None = None,
) -> SplitFiles:
    if images is None:
        raise UserError(f"data.{name}.images is not set: give the folder of the images")
    if annotations is None:
        raise UserError(f"data.{name}.annotations is not set: give the COCO JSON of the split")
    return SplitFiles(Path(images), Path(annotations), Path(ids) if ids else None)
