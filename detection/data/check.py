"""A report on a COCO data set before training: `python -m detection.data.check FILE --images DIR`.

The exit status is 0 where nothing is wrong with it, 1 where something is, and 2 where there is no
report, with one line that says why.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

from detection.data.coco import CocoIndex, check_same_categories
from detection.data.coco_json import CocoReader
from detection.errors import UserError
from detection.files import write_json
from detection.images import MismatchedSize, UnreadableImage

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One kind of thing that is wrong.

    Args:
        kind: what is wrong.
        count: how often.
        cases: where, each of them.
    """

    kind: str
    count: int
    cases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a split holds, and what is wrong with it.

    Args:
        annotations: the COCO JSON.
        num_images: images in it.
        num_images_without_boxes: those that train as background alone.
        num_boxes: boxes to train on.
        num_crowds: boxes of crowds, which are not trained on and ignored in evaluation.
        boxes_per_class: by class name; classes of one name are counted together.
        boxes_per_coco_size: small, medium and large by the annotations' areas, as COCO's metrics
            divide them.
        boxes_per_side: by the square root of the box's area in pixels, in octaves.
        faults: empty where nothing is wrong.
    """

    annotations: str
    num_images: int
    num_images_without_boxes: int
    num_boxes: int
    num_crowds: int
    boxes_per_class: dict[str, int]
    boxes_per_coco_size: dict[str, int]
    boxes_per_side: dict[str, int]
    faults: tuple[Fault, ...]


def read_split(
    images: str | Path, annotations: str | Path
) -> tuple[CocoIndex, Mapping[str, Sequence[str]]]:
    """A split and every case of each problem with its annotations.

    Unlike `CocoIndex.load` it goes on where ids are repeated or images are missing.

    Raises:
        UserError: where there is nothing to report on.
    """
    reader = CocoReader(Path(images), Path(annotations), lenient=True)
    index = CocoIndex(reader.images_dir, reader.annotations_file, reader.read())
    return index, reader.cases


def check_split(
    index: CocoIndex,
    problems: Mapping[str, Sequence[str]],
    others: Sequence[CocoIndex] = (),
    *,
    max_boxes: int = 100,
    show_progress: bool = False,
) -> Report:
    """Decode every image of a split and count what is in it.

    Args:
        index, problems: as `read_split` gives them.
        others: splits that must have the same classes and other images; only their files' bytes
            are compared.
        max_boxes: training takes at most so many boxes of an image.
    """
    boxes = torch.cat([index.boxes(i) for i in range(len(index))])
    labels = torch.cat([index.labels(i) for i in range(len(index))])
    truth = index.ground_truth()["annotations"]
    areas = torch.tensor([a["area"] for a in truth if not a["iscrowd"]], dtype=torch.float64)
    per_class: Counter[str] = Counter()
    counts = labels.bincount(minlength=len(index.categories)).tolist()
    for category, count in zip(index.categories, counts, strict=True):
        per_class[category.name] += count
    by_image = zip(index.count_boxes().tolist(), index.file_names, strict=True)
    crowded = sorted((pair for pair in by_image if pair[0] > max_boxes), reverse=True)
    faults = [
        *([] if len(boxes) else [Fault("no boxes to find", 1, (index.annotations_file.name,))]),
        *(fault for kind, cases in problems.items() for fault in _gather(kind, cases)),
        *_gather(
            f"images with more than max_boxes={max_boxes} boxes: raise data.augmentation.max_boxes",
            (f"{name}: {count}" for count, name in crowded),
        ),
        *_find_faults(index, others, show_progress),
    ]
    return Report(
        annotations=str(index.annotations_file),
        num_images=len(index),
        num_images_without_boxes=int((index.count_boxes() == 0).sum()),
        num_boxes=len(boxes),
        num_crowds=len(truth) - len(boxes),
        boxes_per_class=dict(per_class),
        boxes_per_coco_size={
            "small": int((areas < 32**2).sum()),
            "medium": int(((areas >= 32**2) & (areas < 96**2)).sum()),
            "large": int((areas >= 96**2).sum()),
        },
        boxes_per_side=_count_octaves((boxes[:, 2:] - boxes[:, :2]).double().prod(1).sqrt()),
        faults=tuple(faults),
    )


def render_report(report: Report) -> RenderableType:
    """The report for people."""
    parts: list[RenderableType] = [
        f"{report.num_images} images, {report.num_images_without_boxes} of them without boxes; "
        f"{report.num_boxes} boxes of {len(report.boxes_per_class)} classes; "
        f"{report.num_crowds} boxes of crowds"
    ]
    for title, counts in (
        ("boxes per class", report.boxes_per_class),
        ("boxes per size (COCO's)", report.boxes_per_coco_size),
        ("boxes per square root of the area, pixels", report.boxes_per_side),
    ):
        # Text, because names from the data could hold rich's markup.
        cells = [Text(f"{name} {count}") for name, count in counts.items()]
        parts += ["", title, Columns(cells, padding=(0, 3))]
    if not report.faults:
        return Group(*parts, "", "no faults")
    table = Table("fault", box=SIMPLE_HEAD)
    table.add_column("count", justify="right")
    table.add_column("first case", overflow="fold")
    for fault in report.faults:
        table.add_row(Text(fault.kind), str(fault.count), Text(fault.cases[0]))
    return Group(*parts, "", table)


def _find_faults(
    index: CocoIndex, others: Sequence[CocoIndex], show_progress: bool
) -> Iterator[Fault]:
    # The decoders leave Python's lock to others.
    with ThreadPoolExecutor() as pool:

        def for_each_image(work: Callable[[CocoIndex, int], T], of: CocoIndex) -> list[T]:
            results = pool.map(lambda i: work(of, i), range(len(of)))
            description = f"reading images of {of.annotations_file.name}"
            return list(track(results, description, total=len(of), disable=not show_progress))

        # Both at once: the second then reads what the system still has in memory.
        images = for_each_image(lambda of, i: (_inspect(of, i), _digest(of, i)), index)
        found = [fault for fault, _ in images if fault]
        for kind in sorted({kind for kind, _ in found}):
            yield from _gather(kind, (case for other_kind, case in found if other_kind == kind))

        names: dict[bytes, str] = {}
        repeated = []
        for name, (_, digest) in zip(index.file_names, images, strict=True):
            if digest in names:
                repeated.append(f"{name} is {names[digest]}")
            names.setdefault(digest, name)
        yield from _gather("images twice in the split", repeated)

        for other in others:
            digests = for_each_image(_digest, other)
            shared = [
                f"{names[digest]} is {name}"
                for name, digest in zip(other.file_names, digests, strict=True)
                if digest in names
            ]
            yield from _gather(f"images that {other.annotations_file.name} has as well", shared)
            try:
                check_same_categories(index, other)
            except UserError as error:
                yield Fault(f"classes differ from {other.annotations_file.name}", 1, (str(error),))


def _gather(kind: str, cases: Iterable[str]) -> Iterator[Fault]:
    if cases := tuple(cases):
        yield Fault(kind, len(cases), cases)


def _inspect(index: CocoIndex, i: int) -> tuple[str, str] | None:
    name = index.file_names[i]
    try:
        index.load_image(i)
    except MismatchedSize as error:
        return "images of another size than stated", f"{name}: {error}"
    except UnreadableImage as error:
        if not os.path.lexists(index.image_path(i)):
            return "images that are missing", name
        return "images that cannot be read", f"{name}: {error}"
    return None


def _digest(index: CocoIndex, i: int) -> bytes:
    """Of the file's content; of the name where it cannot be read, which `_inspect` tells."""
    path = index.image_path(i)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return bytes(path)


def _count_octaves(sides: torch.Tensor) -> dict[str, int]:
    if not len(sides):
        return {}
    counts = sides.log2().floor().clamp(min=0).long().bincount().tolist()
    bounds = [0, *(2**k for k in range(1, len(counts) + 1))]
    return {
        f"{low}-{high}": count for (low, high), count in zip(pairwise(bounds), counts, strict=True)
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.data.check",
        description="Report on a COCO data set before training: what it holds and what is wrong "
        "with it. The exit status is 1 where anything is, and 2 where there is no report.",
    )
    parser.add_argument("annotations", metavar="FILE", help="the COCO JSON of the split")
    parser.add_argument("--images", metavar="DIR", required=True, help="the folder of its images")
    parser.add_argument(
        "--other",
        metavar="FILE",
        action="append",
        default=[],
        help="the COCO JSON of another split, which must have the same classes and share no image "
        "with this one; can be given several times",
    )
    parser.add_argument(
        "--other-images",
        metavar="DIR",
        action="append",
        default=[],
        help="the folder of its images, once for each --other (default: --images)",
    )
    parser.add_argument(
        "--max-boxes",
        metavar="N",
        type=int,
        default=100,
        help="data.augmentation.max_boxes of the training: more boxes in an image are a fault "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help='write the report, with all cases, there; {"error": ...} where there is none',
    )
    options = parser.parse_args(arguments)
    folders = options.other_images or [options.images] * len(options.other)
    if len(folders) != len(options.other):
        parser.error("give --other-images once for each --other, or not at all")
    console = Console()
    try:
        index, problems = read_split(options.images, options.annotations)
        others = [
            read_split(images, annotations)[0]
            for images, annotations in zip(folders, options.other, strict=True)
        ]
        report = check_split(
            index,
            problems,
            others,
            max_boxes=options.max_boxes,
            show_progress=console.is_terminal,
        )
        if options.json:
            _write(asdict(report), Path(options.json))
    except UserError as error:
        if options.json:
            with suppress(UserError):  # it may be this file that cannot be written
                _write({"error": str(error)}, Path(options.json))
        parser.exit(2, f"error: {error}\n")
    console.print(render_report(report))
    sys.exit(1 if report.faults else 0)


def _write(content: dict[str, Any], path: Path) -> None:
    try:
        write_json(content, path, indent=2)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
