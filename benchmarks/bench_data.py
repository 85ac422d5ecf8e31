"""Images a second from JPEG files to the tensors of a loader: ours and torchvision's reference.

    python benchmarks/bench_data.py --images DIR --annotations FILE [--workers 2] [--input-size 300]

Theirs is the preset "ssd" of torchvision's references/detection, written with the same operations
and parameters; it leaves the resize to the model, ours has it done. Ours runs twice: with the same
augmentation (crop, flip, colours, zoom-out) and with the default (crop and flip). The sides read
the same images in turns; rates are medians over the rounds, ratios are to theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, collate
from detection.data.transforms import TrainTransform
from detection.preprocess import Preprocess

SAME = {"photometric": 0.5, "zoom_out": 0.5}


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
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4, help="passes over the images a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    index = CocoIndex.load(images=options.images, annotations=options.annotations)
    order = [i for _ in range(options.epochs) for i in torch.randperm(len(index)).tolist()]
    resize = Preprocess(input_size=options.input_size).resize
    sides: dict[str, tuple[Dataset[Any], Any]] = {
        "torchvision's reference": (Reference(index), list_samples)
    }
    for name, changes in (("ours, same augmentation", SAME), ("ours, default", {})):
        transform = TrainTransform(resize=resize, **changes)
        sides[name] = DetectionDataset(index, transform, seed=0, training=True), collate
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (dataset, collate_fn) in sides.items():
            rates[name].append(measure(dataset, collate_fn, order, options))
    theirs = statistics.median(rates["torchvision's reference"])
    print(f"{len(index)} images, {options.workers} workers, input {options.input_size}")
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{name:24} {median:7.1f} images/s ({spread})  {median / theirs:.2f} x")


if __name__ == "__main__":
    main()
