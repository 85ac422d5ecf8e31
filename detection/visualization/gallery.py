"""Pictures set side by side and into sheets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from detection.boxes import pairwise_iou
from detection.structures import ImageDetections
from detection.visualization.drawing import draw_boxes

BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)


def side_by_side(
    image: Image.Image | np.ndarray | Tensor,
    truth_boxes_xyxy: Tensor,
    truth_labels: Tensor,
    detections: ImageDetections,
    *,
    names: Sequence[str],
    score_threshold: float = 0.0,
    min_size: int = 480,
    gap: int = 8,
) -> Image.Image:
    """Ground truth on the left, detections on the right, each under its caption.

    What is missed and what is false is dashed and named so; see `match_detections`.

    Args:
        image: as in `draw_boxes`.
        truth_boxes_xyxy: (G, 4) in pixels of the image.
        truth_labels: (G,) places in `names`.
        detections: what the detector found in the image.
        names: the class names.
        score_threshold: detections of a lower score are left out.
        min_size: as in `draw_boxes`.
        gap: pixels between the two.
    """
    kept = detections.scores >= score_threshold
    boxes, scores, labels = (field[kept] for field in detections[:3])
    shown = ImageDetections(boxes, scores, labels)
    found, correct = match_detections(truth_boxes_xyxy, truth_labels, shown)
    return contact_sheet(
        [
            draw_boxes(
                image,
                truth_boxes_xyxy,
                truth_labels,
                names=names,
                marks=["" if one else "missed" for one in found],
                min_size=min_size,
            ),
            draw_boxes(
                image,
                boxes,
                labels,
                scores,
                names=names,
                marks=["" if one else "false" for one in correct],
                min_size=min_size,
            ),
        ],
        columns=2,
        captions=[
            f"ground truth: {len(found)}, {found.count(False)} missed",
            f"detections of score {score_threshold:.2f} or more: {len(correct)},"
            f" {correct.count(False)} false",
        ],
        gap=gap,
    )


def match_detections(
    truth_boxes_xyxy: Tensor,
    truth_labels: Tensor,
    detections: ImageDetections,
    *,
    iou_threshold: float = 0.5,
) -> tuple[list[bool], list[bool]]:
    """Which ground truth is found, and which detections are correct: (G,) and (N,).

    As COCO matches: the surest detection first, each takes the free box of its class that it
    overlaps most, if by the threshold at least.
    """
    found, correct = [False] * len(truth_labels), [False] * len(detections.labels)
    same = detections.labels[:, None] == truth_labels
    overlaps = pairwise_iou(detections.boxes, truth_boxes_xyxy.float()) * same
    for i in detections.scores.argsort(descending=True, stable=True).tolist():
        free = [j for j, taken in enumerate(found) if not taken and overlaps[i, j] >= iou_threshold]
        if free:
            found[max(free, key=overlaps[i].__getitem__)] = correct[i] = True
    return found, correct


def contact_sheet(
    pictures: Sequence[Image.Image],
    *,
    columns: int = 3,
    max_size: int | None = None,
    captions: Sequence[str] | None = None,
    gap: int = 8,
) -> Image.Image:
    """The pictures in a grid, row by row.

    Args:
        pictures: at least one.
        columns: pictures a row; fewer where there are fewer pictures.
        max_size: larger pictures are shrunk so that no side is longer; None keeps all sizes.
        captions: one line for each picture, above it.
        gap: pixels between pictures.

    Raises:
        ValueError: there is no picture, or a caption is missing.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    if max_size:
        box = (max_size, max_size)
        pictures = [
            ImageOps.contain(p, box, Image.Resampling.LANCZOS) if max(p.size) > max_size else p
            for p in pictures
        ]
    if captions is not None:
        pictures = [_add_caption(*pair) for pair in zip(pictures, captions, strict=True)]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    cell_width = max(p.width for p in pictures)
    heights = [max(p.height for p in row) for row in rows]
    width = (cell_width + gap) * len(rows[0]) - gap
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), BACKGROUND)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left = column * (cell_width + gap) + (cell_width - picture.width) // 2
            sheet.paste(picture, (left, top + (height - picture.height) // 2))
        top += height + gap
    return sheet


def _add_caption(picture: Image.Image, caption: str) -> Image.Image:
    size = max(12, round(max(picture.size) / 40))
    captioned = Image.new("RGB", (picture.width, picture.height + 2 * size), BACKGROUND)
    captioned.paste(picture, (0, 2 * size))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(captioned).text((size // 2, size), caption, fill=INK, font=font, anchor="lm")
    return captioned
