"""Pictures of evaluation results: ground truth beside detections."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detection.data.coco import CocoIndex
from detection.data.sampler import spread
from detection.images import UnreadableImage
from detection.structures import ImageDetections
from detection.visualization.gallery import contact_sheet, side_by_side
from detection.visualization.media import write_picture


def draw_pairs(
    index: CocoIndex,
    results: Sequence[Mapping[str, Any]],
    *,
    num_pictures: int,
    score_threshold: float,
) -> dict[int, Image.Image]:
    """Images spread evenly over a split, ground truth beside detections, by image id.

    Args:
        results: detections in the COCO results format.
        num_pictures: how many images; those that cannot be read are left out.
        score_threshold: detections of a lower score are not drawn.
    """
    labels = {category.id: label for label, category in enumerate(index.categories)}
    by_image: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    pictures = {}
    for i in spread(len(index), num_pictures):
        try:
            image = index.load_image(i)
        except UnreadableImage:
            continue
        pictures[index.image_ids[i]] = side_by_side(
            image,
            index.boxes(i),
            index.labels(i),
            _to_detections(by_image[index.image_ids[i]], labels),
            names=index.names,
            score_threshold=score_threshold,
        )
    return pictures


def draw_results(
    index: CocoIndex,
    results: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    num_pictures: int,
    score_threshold: float,
) -> list[Path]:
    """Write `draw_pairs`, and a sheet of the first of them.

    Args:
        folder: for one JPEG an image, named by its id, and `overview.jpg`. What it holds of an
            earlier call, as `pictures.txt` lists them, is deleted; other files are left.

    Returns:
        The pictures written.
    """
    pairs = draw_pairs(index, results, num_pictures=num_pictures, score_threshold=score_threshold)
    pictures = {f"{image_id}.jpg": picture for image_id, picture in pairs.items()}
    if pairs:
        sheet = contact_sheet(list(pairs.values())[:6], columns=2, max_size=900)
        pictures["overview.jpg"] = sheet
    listing = Path(folder) / "pictures.txt"
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if re.fullmatch(r"(-?\d+|overview)\.jpg", line):
                (Path(folder) / line).unlink(missing_ok=True)
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{name}\n" for name in pictures), encoding="utf-8")
    paths = [Path(folder) / name for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        write_picture(picture, path)
    return paths


def _to_detections(
    results: Sequence[Mapping[str, Any]], labels: Mapping[int, int]
) -> ImageDetections:
    ranked = sorted(results, key=lambda result: -result["score"])
    boxes = torch.tensor([result["bbox"] for result in ranked], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return ImageDetections(
        boxes=boxes,
        scores=torch.tensor([result["score"] for result in ranked], dtype=torch.float32),
        labels=torch.tensor([labels[result["category_id"]] for result in ranked]),
    )
