"""Images a second from JPEG files to the tensors of a loader: ours and torchvision's reference.

    python benchmarks/bench_data.py --images DIR --annotations FILE [--workers 2] [--input-size 300]

Theirs is the preset "ssd" of torchvision's references/detection, written with the same operations
and parameters; it leaves the resize to the model, ours has it done. Ours runs with the same
augmentation (crop, flip, colours, zoom-out) and with the default (crop and flip); each as it is,
and from a cache of images in memory that is full, as from the second epoch on. With --shrink F,
also with `data.shrink=F`. With --large N, the images are photographs of N x N * 2/3 pixels, put
together from the given ones in a temporary folder. The sides read the same images in turns; rates
are medians over the rounds, ratios are to theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from detection.augmentation import Augmentation
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, collate, find_shorter_side
from detection.data.image_cache import SHARED_MEMORY, open_cache
from detection.data.transforms import TrainTransform
from detection.preprocess import Preprocess

THEIRS = "torchvision's reference"
SAME = {"photometric": 0.5, "zoom_out": 0.5}
NUM_LARGE = 16


class Reference(Dataset[Any]):
    """torchvision's `DetectionPresetTrain(data_augmentation="ssd")` on Pillow images."""

    def __init__(self, index: CocoIndex) -> None:
        self.index = index
        self.transform = v2.Compose(
            [
                v2.RandomPhotometricDistort(),
                v2.RandomZoomOut(fill=(123, 117, 104)),
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(0.5),
                v2.PILToTensor(),
                v2.ToDtype(torch.float, scale=True),
                v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        image = Image.open(self.index.images_dir / self.index.file_names[i]).convert("RGB")
        boxes: Any = tv_tensors.BoundingBoxes(
            self.index.boxes(i), format="XYXY", canvas_size=self.index.sizes[i]
        )  # pyright: ignore[reportCallIssue]
        return self.transform(image, {"boxes": boxes, "labels": self.index.labels(i)})


def list_samples(samples: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))  # as the reference collates


def make_large(index: CocoIndex, width: int, folder: Path) -> CocoIndex:
    """Photographs of `width` and two thirds of it, laid out with given ones at their own size."""
    height = width * 2 // 3
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    source = 0
    for number in range(NUM_LARGE):
        sheet = Image.new("RGB", (width, height))
        for top in range(0, height, 480):
            left = 0
            while left < width:
                i = source % len(index)
                source += 1
                picture = Image.open(index.images_dir / index.file_names[i])
                sheet.paste(picture.convert("RGB"), (left, top))
                for x1, y1, x2, y2 in index.boxes(i).tolist():
                    x2, y2 = min(x2, width - left), min(y2, height - top, 480.0)
                    if x2 > x1 and y2 > y1:
                        bbox = [left + x1, top + y1, x2 - x1, y2 - y1]
                        annotation = {"image_id": number, "category_id": 1, "bbox": bbox}
                        annotations.append({"id": len(annotations), **annotation})
                left += picture.width
        sheet.save(folder / f"{number}.jpg", quality=90)
        os.utime(
            folder / f"{number}.jpg", (0, 0)
        )  # the cache leaves out what is just being written
        size = {"width": width, "height": height}
        images.append({"id": number, "file_name": f"{number}.jpg", **size})
    file = folder / "instances.json"
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return CocoIndex.load(images=folder, annotations=file)


def make_sides(index: CocoIndex, options: Any, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Data sets and how to collate, by name; the caches are full."""
    resize = Preprocess(input_size=options.input_size).resize
    sides: dict[str, tuple[Any, Any]] = {THEIRS: (Reference(index), list_samples)}
    for name, changes in (("same augmentation", SAME), ("default", {})):
        for shrink in dict.fromkeys((None, options.shrink)):
            side = find_shorter_side(shrink, options.input_size)
            cache = open_cache(folder / f"{side}.pixels", index, shorter_side=side, in_memory=True)
            for own_cache in (None, cache):
                dataset = DetectionDataset(
                    index,
                    TrainTransform(Augmentation(**changes), resize=resize),
                    seed=0,
                    training=True,
                    shorter_side=side,
                    cache=own_cache,
                )
                if own_cache is not None:
                    for i in range(len(dataset)):
                        dataset[i]
                words = f", shrink {shrink}" if shrink else ""
                words += ", cached" if own_cache is not None else ""
                sides[f"ours, {name}{words}"] = dataset, collate
    return sides


def measure(dataset: Dataset[Any], collate_fn: Any, order: list[int], options: Any) -> float:
    """Images a second, without the start of the workers."""
    loader = DataLoader(
        dataset,
        options.batch_size,
        sampler=order,
        num_workers=options.workers,
        collate_fn=collate_fn,
        drop_last=True,
    )
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * options.batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second of the input pipeline.")
    parser.add_argument("--images", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--annotations", type=Path, required=True, help="their COCO JSON")
    parser.add_argument("--input-size", type=int, default=300)
    parser.add_argument("--shrink", type=float, help="also with data.shrink of this")
    parser.add_argument("--large", type=int, metavar="N", help="photographs N pixels wide")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2, help="passes over the images a turn")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as images,
        tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as cache,
    ):
        index = CocoIndex.load(images=options.images, annotations=options.annotations)
        if options.large:
            index = make_large(index, options.large, Path(images))
        order = [i for _ in range(options.epochs) for i in torch.randperm(len(index)).tolist()]
        sides = make_sides(index, options, Path(cache))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, (dataset, collate_fn) in sides.items():
                rates[name].append(measure(dataset, collate_fn, order, options))
    theirs = rates[THEIRS]
    print(
        f"{len(index)} images, the first {index.sizes[0][1]} x {index.sizes[0][0]}; "
        f"{options.workers} workers, input {options.input_size}, {options.rounds} rounds; "
        f"Pillow {PIL.__version__}, libjpeg-turbo: {features.check_feature('libjpeg_turbo')}"
    )
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        ratio = median / statistics.median(theirs)
        least = min(values) / max(theirs)
        print(
            f"{name:42} {median:7.1f} images/s ({spread})  {ratio:.2f} x; "
            f"slowest over their fastest {least:.2f}"
        )


if __name__ == "__main__":
    main()
