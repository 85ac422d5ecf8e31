"""Writes docs/images/augmentation.jpg: the options of docs/augmentation.md on the embedded set.

python docs/augmentation.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detection.data.coco import CocoIndex
from detection.data.dataset import collate
from detection.data.sources import load_split, shapes
from detection.engine.inputs import TrainingInputs
from detection.preprocess import Preprocess
from detection.visualization.drawing import draw_boxes
from detection.visualization.gallery import contact_sheet

PICTURE = Path(__file__).parent / "images" / "augmentation.jpg"
INPUT_SIZE = 160
# Of `data.augmentation`.
ROWS: dict[str, dict[str, Any]] = {
    "mosaic=1": {"mosaic": 1.0, "crop": "none"},
    "mosaic=1, crop=ssd": {"mosaic": 1.0},
    "mixup=1": {"mixup": 1.0, "crop": "none"},
    "on_device=1.5": {"on_device": 1.5, "photometric": 0.5, "zoom_out": 0.5},
}


def draw_row(index: CocoIndex, options: dict[str, Any], count: int) -> list[Image.Image]:
    """The first images of a split, as the network is given them."""
    inputs = TrainingInputs(index, Preprocess(input_size=INPUT_SIZE), seed=0, **options)
    batch = collate([inputs.dataset[0, i] for i in range(count)])
    images, targets = inputs.to_device(batch, 0, torch.device("cpu"))
    names = [category.name for category in index.categories]
    return [
        draw_boxes(image.round().byte(), boxes[valid], labels[valid], names=names, min_size=320)
        for image, boxes, labels, valid in zip(images, *targets, strict=True)
    ]


def main() -> None:
    index = load_split(shapes().train)
    count = 4
    pictures, captions = [], []
    for caption, options in ROWS.items():
        pictures += draw_row(index, options, count)
        captions += [caption] + [" "] * (count - 1)
    sheet = contact_sheet(pictures, columns=count, max_size=200, captions=captions)
    sheet.save(PICTURE, quality=80)


if __name__ == "__main__":
    main()
