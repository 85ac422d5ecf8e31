"""Boxes with class names and scores, drawn onto pictures.

Shapes: N boxes of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detection.errors import UserError
from detection.onnx_detector import ArrayDetections
from detection.structures import ImageDetections
from detection.visualization.colors import class_colors, text_color

# Left, top, right, bottom in pixels; right and bottom are outside.
Rectangle = tuple[int, int, int, int]
DASH = (255, 255, 255)


def draw_detections(
    image: Image.Image | np.ndarray | Tensor,
    detections: ImageDetections | ArrayDetections,
    *,
    names: Sequence[str] | None = None,
    score_threshold: float = 0.0,
    min_size: int = 480,
) -> Image.Image:
    """`draw_boxes` of what a detector's `predict` gives for an image.

    Args:
        names: the class names; None takes those of the detections, which `Detector` gives them.
    """
    return draw_boxes(
        image,
        detections.boxes,
        detections.labels,
        detections.scores,
        names=getattr(detections, "names", ()) if names is None else names,
        score_threshold=score_threshold,
        min_size=min_size,
    )


def draw_boxes(
    image: Image.Image | np.ndarray | Tensor,
    boxes_xyxy: Any,
    labels: Any,
    scores: Any = None,
    *,
    names: Sequence[str],
    marks: Sequence[str] | None = None,
    score_threshold: float = 0.0,
    min_size: int = 480,
) -> Image.Image:
    """The image with its boxes, each labelled with class and score, the surest on top.

    Args:
        image: a PIL image, a uint8 array (H, W), (H, W, 1) or (H, W, 3), or a uint8 tensor (H, W),
            (1, H, W) or (3, H, W). It is not changed.
        boxes_xyxy: (N, 4) in pixels of the image: tensor, array or list.
        labels: (N,) places in `names`.
        scores: (N,), or None for boxes that have none, as ground truth: all of those are drawn.
        names: the class names, which also decide the colours. What Pillow's own font lacks is
            written in an installed font that has it.
        marks: a word for each box, before its name; a box with one gets a dashed frame.
        score_threshold: boxes of a lower score are left out.
        min_size: an image whose longer side is below this is enlarged by a whole factor to at least
            this, so that labels stay legible; 0 never enlarges.

    Returns:
        A new RGB picture.

    Raises:
        UserError: the image is of another type or shape, or a label has no name.
    """
    picture = to_picture(image)
    scale = max(1, math.ceil(min_size / max(picture.size)))
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        picture = picture.resize(size, Image.Resampling.BICUBIC)

    boxes = torch.as_tensor(boxes_xyxy, dtype=torch.float64).reshape(-1, 4).mul(scale).tolist()
    places = [int(label) for label in torch.as_tensor(labels)]
    if places and max(places) >= len(names):
        raise UserError(f"label {max(places)} has no name: give names, {len(names)} are known")
    box_names = [names[place] for place in places]
    marks = marks or [""] * len(boxes)
    order = list(range(len(boxes)))
    texts = [""] * len(boxes)
    if scores is not None:
        values = torch.as_tensor(scores).tolist()
        order = sorted((i for i in order if values[i] >= score_threshold), key=values.__getitem__)
        texts = [f" {value:.2f}" for value in values]

    draw = ImageDraw.Draw(picture)
    line_width = max(2, round(max(picture.size) / 320))
    font_size = max(12, round(max(picture.size) / 48))
    colors = class_colors(names)
    rectangles = [_to_rectangle(boxes[i], picture.size) for i in order]
    for i, (left, top, right, bottom) in zip(order, rectangles, strict=True):
        outline = colors[box_names[i]]
        draw.rectangle((left, top, right - 1, bottom - 1), outline=outline, width=line_width)
        if marks[i]:
            _dash(draw, (left, top, right, bottom), line_width)

    padding = font_size // 5
    max_width = picture.width - 2 * padding
    written = [f"{marks[i]} {box_names[i]}".lstrip() for i in order]
    fonts = [_font(text, font_size) for text in written]
    texts = [
        _shorten(text, texts[i], font, max_width)
        for i, text, font in zip(order, written, fonts, strict=True)
    ]
    sizes = [
        (math.ceil(font.getlength(text)) + 2 * padding, font_size + 2 * padding)
        for text, font in zip(texts, fonts, strict=True)
    ]
    label_places = _place_labels(rectangles, sizes, picture.size)
    for i, text, font, (left, top, right, bottom) in zip(
        order, texts, fonts, label_places, strict=True
    ):
        color = colors[box_names[i]]
        draw.rectangle((left, top, right - 1, bottom - 1), fill=color)
        middle = (left + padding, (top + bottom) / 2)
        draw.text(middle, text, fill=text_color(color), font=font, anchor="lm")
    return picture


def to_picture(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """A new RGB picture of an image in any form that `draw_detections` takes."""
    if isinstance(image, Image.Image):
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    array = np.asarray(image.cpu()) if isinstance(image, Tensor) else image
    if isinstance(image, Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.shape[2:] in ((1,), (3,))):
        raise UserError(
            f"cannot draw on {image.dtype} of shape {tuple(image.shape)}: give a PIL image,"
            " a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)"
        )
    array = array[:, :, 0] if array.shape[2:] == (1,) else array
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


@cache
def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or the first that has all characters of the text."""
    if text.isascii():
        return ImageFont.load_default(size)
    path = _find_font(frozenset(text))
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def _find_font(characters: frozenset[str]) -> str | None:
    # Matplotlib brings DejaVu Sans, and knows what else is installed; few pictures need it.
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    # Last Resort has a sign for every block of characters, and no character.
    installed = sorted(
        {f.fname for f in font_manager.fontManager.ttflist if "Last Resort" not in f.name}
    )
    for path in [font_manager.findfont("DejaVu Sans"), *installed]:
        try:
            known = FT2Font(path).get_charmap()
        except (OSError, RuntimeError):
            continue
        if all(ord(character) in known for character in characters):
            return path
    return None


def _dash(draw: ImageDraw.ImageDraw, rectangle: Rectangle, width: int) -> None:
    """White dashes on a frame."""
    left, top, right, bottom = rectangle
    length = 4 * width
    for x in range(left + length, right - width, 2 * length):
        end = min(x + length, right) - 1
        draw.rectangle((x, top, end, min(top + width, bottom) - 1), fill=DASH)
        draw.rectangle((x, max(bottom - width, top), end, bottom - 1), fill=DASH)
    for y in range(top + length, bottom - width, 2 * length):
        end = min(y + length, bottom) - 1
        draw.rectangle((left, y, min(left + width, right) - 1, end), fill=DASH)
        draw.rectangle((max(right - width, left), y, right - 1, end), fill=DASH)


def _to_rectangle(box_xyxy: list[float], size: tuple[int, int]) -> Rectangle:
    """The whole pixels of a box, inside the picture and at least one pixel each way."""
    x1, y1, x2, y2 = map(round, box_xyxy)
    left, top = (min(max(v, 0), limit - 1) for v, limit in zip((x1, y1), size, strict=True))
    return left, top, min(max(x2, left + 1), size[0]), min(max(y2, top + 1), size[1])


def _shorten(name: str, score: str, font: Any, max_width: int) -> str:
    text = name + score
    while name and font.getlength(text) > max_width:
        name = name[:-1]
        text = f"{name}…{score}"
    return text


def _place_labels(
    boxes: list[Rectangle], sizes: list[tuple[int, int]], picture_size: tuple[int, int]
) -> list[Rectangle]:
    """A place for each label at its box, covering as little as can be of the labels on top of it.

    Args:
        boxes: in drawing order, the last on top.
        sizes: (width, height) of each label.
        picture_size: (width, height); labels stay inside.
    """
    places: list[Rectangle] = []
    for (left, top, right, bottom), (width, height) in zip(
        reversed(boxes), reversed(sizes), strict=True
    ):
        corners = [
            (left, top - height),
            (right - width, top - height),
            (left, bottom),
            (right - width, bottom),
            (left, top),
            (left, bottom - height),
        ]
        candidates = []
        for x, y in corners:
            x = max(0, min(x, picture_size[0] - width))
            y = max(0, min(y, picture_size[1] - height))
            candidates.append((x, y, x + width, y + height))
        places.append(min(candidates, key=lambda c: sum(_overlap(c, place) for place in places)))
    return places[::-1]


def _overlap(a: Rectangle, b: Rectangle) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
