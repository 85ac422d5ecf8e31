"""Writes docs/images/augmentation.jpg: the options of docs/augmentation.md on the embedded set.

python docs/augmentation.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detection.augmentation import Augmentation
from detection.data.coco import CocoIndex
from detection.data.dataset import collate
from detection.data.sources import load_split, shapes
from detection.engine.inputs import TrainingInputs
from detection.preprocess import Preprocess
from detection.visualization.drawing import draw_boxes
from detection.visualization.gallery import BACKGROUND, contact_sheet

PICTURE = Path(__file__).parent / "images" / "augmentation.jpg"
INPUT_SIZE = 160
CELL = 200  # pixels a side of the largest input of a row
SEED = 22  # its first steps have four input sizes
# Of `data.augmentation`.
ROWS: dict[str, dict[str, Any]] = {
    "mosaic=1": {"mosaic": 1.0, "crop": "none"},
    "mosaic=1, crop=ssd": {"mosaic": 1.0},
    "mixup=1": {"mixup": 1.0, "crop": "none"},
    "multi_scale=[96,224,32]": {"multi_scale": (96, 224, 32), "crop": "none"},
    "on_device=1.5": {"on_device": 1.5, "photometric": 0.5, "zoom_out": 0.5},
}


def draw_row(
    index: CocoIndex, caption: str, options: dict[str, Any], count: int
) -> tuple[list[Image.Image], list[str]]:
    """The first images of a split, each as the network is given it in a step of its own."""
    inputs = TrainingInputs(
        index, Preprocess(input_size=INPUT_SIZE), Augmentation(**options), seed=SEED
    )
    pictures, captions = [], []
    for step in range(count):
        batch = collate([inputs.dataset[0, step]])
        (image,), targets = inputs.to_device(batch, step, torch.device("cpu"))
        boxes, labels, valid = (field[0] for field in targets)
        drawn = draw_boxes(
            image.round().byte(), boxes[valid], labels[valid], names=index.names, min_size=320
        )
        side = CELL * image.shape[-1] // max(inputs.input_sizes)
        cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
        cell.paste(drawn.resize((side, side), Image.Resampling.LANCZOS))
        pictures.append(cell)
        words = [caption] if step == 0 else []
        if len(inputs.input_sizes) > 1:
            words.append(f"{image.shape[-1]} px")
        captions.append(": ".join(words) or " ")
    return pictures, captions


def main() -> None:
    index = load_split(shapes().train)
    count = 4
    pictures, captions = [], []
    for caption, options in ROWS.items():
        row = draw_row(index, caption, options, count)
        pictures += row[0]
        captions += row[1]
    contact_sheet(pictures, columns=count, captions=captions).save(PICTURE, quality=80)


if __name__ == "__main__":
    main()
