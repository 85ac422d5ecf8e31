"""The embedded data set: geometric shapes on busy backgrounds, drawn once into a cache folder.

It is written as JPEG and COCO JSON, so that it is read like any other data set. What makes it
hard: colour tells the class of most shapes, but not of all; some differ little from what lies
behind them; bars and flat ellipses are no class; there are textures on both shape and background,
occlusion, small shapes, noise and blur.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from colorsys import hsv_to_rgb
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from detection.data.index_cache import cache_folder
from detection.errors import UserError

# A new number makes everyone draw the set anew: raise it with each change to the pictures.
VERSION = 2

_SUPERSAMPLING = 4
_SPLIT_SEEDS = {"train": 0, "val": 1}

FloatArray = NDArray[np.floating[Any]]
Random = np.random.Generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the set is drawn from. Sizes in pixels; pairs are bounds.

    Args:
        num_train: images to train on.
        num_val: images to evaluate on.
        image_size: width and height, drawn apart from each other.
        object_size: diameter of a shape before squeezing, uniform in its logarithm.
        max_objects: shapes in an image, at most.
        empty: share of images without any shape.
        min_visible: share of a shape that other shapes leave uncovered, at least.
        low_contrast: share of shapes whose colour is close to what lies behind them.
        typical_colour: share of the other shapes that have the hue of their class, more or less;
            the rest have any.
        max_distractors: lines, blobs, bars and scribbles of no class in an image, at most.
        max_noise: standard deviation of the pixel noise, at most (of 255).
        max_blur: radius of the blur, at most.
        seed: another seed, another set.
    """

    num_train: int = 1500
    num_val: int = 300
    image_size: tuple[int, int] = (160, 256)
    object_size: tuple[float, float] = (32.0, 120.0)
    max_objects: int = 6
    empty: float = 0.06
    min_visible: float = 0.75
    low_contrast: float = 0.05
    typical_colour: float = 0.92
    max_distractors: int = 3
    max_noise: float = 8.0
    max_blur: float = 1.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "max_objects"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"data.{name}={value}: give a whole number of at least 1")
        for name in ("image_size", "object_size"):
            value = getattr(self, name)
            if len(value) != 2 or not 1 <= value[0] <= value[1]:
                raise UserError(f"data.{name}={list(value)}: give [least, most] in pixels")


class _Outline(NamedTuple):
    """A shape of radius 1 around the origin: polygons (P, 2), filled and then cut out."""

    filled: list[FloatArray]
    cut: list[FloatArray]


def _regular(corners: int, radius: float = 1.0, shift: float = 0.0) -> FloatArray:
    angles = 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1) + [shift, 0.0]


def _draw_cross(random: Random) -> _Outline:
    arm = random.uniform(0.28, 0.4)
    bar = np.array([[-1, -arm], [1, -arm], [1, arm], [-1, arm]])
    return _Outline([bar, bar[:, ::-1]], [])


def _draw_ring(random: Random) -> _Outline:
    return _Outline([_regular(64)], [_regular(64, random.uniform(0.45, 0.7))])


# Each has a hue of its own: see `Recipe.typical_colour`.
CLASSES: dict[str, Callable[[Random], _Outline]] = {
    "circle": lambda random: _Outline([_regular(64)], []),
    "ring": _draw_ring,
    "triangle": lambda random: _Outline([_regular(3)], []),
    "square": lambda random: _Outline([_regular(4)], []),
    "cross": _draw_cross,
}


def provide(recipe: Recipe, root: str | Path | None = None) -> Path:
    """The folder of the set, drawn first if it is not there or not complete.

    Several processes may ask at once: each draws into a folder of its own, and the first to end
    gives it its final name.

    Args:
        recipe: what to draw.
        root: the folder that holds the sets; `condconv-detection` in the user's cache if None.

    Returns:
        A folder with `images/<split>/` and `annotations/instances_<split>.json` of "train", "val".

    Raises:
        UserError: the folder cannot be written.
    """
    parent = Path(root) if root else cache_folder()
    digest = blake2b(json.dumps(asdict(recipe), default=list).encode(), digest_size=6).hexdigest()
    folder = parent / f"shapes-{VERSION}-{digest}"
    if _is_complete(folder, recipe):
        return folder
    logger.info("drawing %d images into %s", recipe.num_train + recipe.num_val, folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="drawing-", dir=parent) as temporary:
            drawn = Path(temporary) / "set"
            _write_set(drawn, recipe)
            if not _is_complete(folder, recipe):
                with suppress(FileNotFoundError):
                    folder.rename(Path(temporary) / "incomplete")
                try:
                    drawn.rename(folder)
                except OSError:
                    # Another process may have been first: theirs holds the same images.
                    if not _is_complete(folder, recipe):
                        raise
    except OSError as error:
        raise UserError(
            f"the shapes cannot be drawn into {folder} ({error.strerror}): "
            "set data.root to a folder that can be written"
        ) from error
    return folder


def draw_image(random: Random, recipe: Recipe) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One RGB image and its annotations: COCO's `category_id`, `bbox` and `area`.

    A box is that of the whole shape inside the image, whatever covers it.
    """
    width, height = (int(n) for n in random.integers(*recipe.image_size, size=2, endpoint=True))
    canvas = _draw_texture(random, height, width)
    for _ in range(random.integers(recipe.max_distractors + 1)):
        _draw_distractor(random, canvas)
    annotations = _draw_objects(random, canvas, recipe)
    for _ in range(random.integers(3)):
        _draw_scribble(random, canvas, thickness=1)

    light = _draw_field(random, height, width, octaves=1)
    canvas *= 1 + np.float32(random.uniform(0, 0.35)) * (light - 0.5)
    noise = random.uniform(0, recipe.max_noise)
    canvas += np.float32(noise) * random.standard_normal(canvas.shape, np.float32)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    if random.random() < 0.4:
        blur = ImageFilter.GaussianBlur(random.uniform(0.3, max(recipe.max_blur, 0.3)))
        image = image.filter(blur)
    return image, annotations


def _draw_objects(random: Random, canvas: FloatArray, recipe: Recipe) -> list[dict[str, Any]]:
    height, width = canvas.shape[1:]
    owners = np.full((height, width), -1)  # which shape is seen at each pixel
    areas, visible = np.zeros(0), np.zeros(0)  # of each shape, in whole pixels
    annotations: list[dict[str, Any]] = []
    wanted = 0 if random.random() < recipe.empty else random.integers(1, recipe.max_objects + 1)
    for _ in range(4 * wanted):  # some find no place
        if len(annotations) == wanted:
            break
        label = int(random.integers(len(CLASSES)))
        smallest, largest = np.log(recipe.object_size)
        size = min(np.exp(random.uniform(smallest, largest)), 0.85 * min(height, width))
        outline = list(CLASSES.values())[label](random)
        placed = _place(random, outline, size, height, width)
        if placed is None:
            continue
        alpha, (top, left), bbox = placed
        window = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
        seen = owners[window]
        inside = alpha > 0.5
        lost = np.bincount(seen[inside & (seen >= 0)], minlength=len(areas))
        if not inside.any() or np.any(visible - lost < recipe.min_visible * areas):
            continue
        region = canvas[:, *window]
        faint = random.random() < recipe.low_contrast
        if faint:
            colour = _find_colour_near(random, region, alpha)
        else:
            typical = random.random() < recipe.typical_colour
            hue = (label + random.normal(0, 0.2)) / len(CLASSES) if typical else random.random()
            colour = _find_vivid_colour(random, hue)
        _paint(random, region, alpha, colour)
        seen[inside] = len(areas)
        areas = np.append(areas, inside.sum())
        visible = np.append(visible - lost, inside.sum())
        annotations.append({"category_id": label + 1, "bbox": bbox, "area": float(alpha.sum())})
    return annotations


def _place(
    random: Random,
    outline: _Outline,
    size: float,
    height: int,
    width: int,
    squeeze: tuple[float, float] = (0.82, 1.0),
) -> tuple[FloatArray, tuple[int, int], list[float]] | None:
    """Turns, squeezes and places a shape: its coverage of the pixels, their corner, its box.

    None if too much of it would lie outside of the image.
    """
    angle, slant = random.uniform(0, 2 * np.pi, 2)
    factor = random.uniform(*squeeze)
    squeezed = _rotation(slant) @ np.diag([1.0, factor]) @ _rotation(-slant)
    matrix = size / 2 * squeezed @ _rotation(angle)
    margin = 0.3 * size
    centre = random.uniform([margin, margin], [width - margin, height - margin])
    filled, cut = ([points @ matrix.T + centre for points in part] for part in outline)
    corners = np.concatenate(filled)
    low = np.floor(corners.min(0)).astype(int)
    high = np.ceil(corners.max(0)).astype(int)
    inner_low, inner_high = low.clip(0), np.minimum(high, [width, height])
    shape = (inner_high - inner_low) * _SUPERSAMPLING
    if np.prod(inner_high - inner_low) < 0.7 * np.prod(high - low):
        return None
    mask = Image.new("L", tuple(shape.tolist()))
    draw = ImageDraw.Draw(mask)
    for polygons, value in ((filled, 255), (cut, 0)):
        for points in polygons:
            draw.polygon(
                [tuple(p) for p in ((points - inner_low) * _SUPERSAMPLING - 0.5).tolist()], value
            )
    extent = mask.getbbox()
    if extent is None:
        return None
    x1, y1, x2, y2 = np.array(extent) / _SUPERSAMPLING + np.tile(inner_low, 2)
    alpha = np.asarray(mask.reduce(_SUPERSAMPLING), np.float32) / 255
    bbox = [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]
    return alpha, (int(inner_low[1]), int(inner_low[0])), bbox


def _paint(random: Random, region: FloatArray, alpha: FloatArray, colour: FloatArray) -> None:
    """Fills a shape into a region of the canvas, in place: in one colour, or in lights of it."""
    fill = colour[:, None, None]
    kind = random.random()
    if kind < 0.55:
        darker = random.uniform(0.5, 0.85) * colour
        if kind < 0.2:
            pattern = _draw_gradient(random, *alpha.shape)
        elif kind < 0.4:
            pattern = _draw_field(random, *alpha.shape, octaves=3)
        else:
            pattern = _draw_stripes(random, *alpha.shape)
        fill = fill + pattern * (darker - colour)[:, None, None]
    region += (fill - region) * alpha


def _draw_distractor(random: Random, canvas: FloatArray) -> None:
    """Something of no class: a scribble, a soft blob, a long bar or a flat ellipse."""
    height, width = canvas.shape[1:]
    kind = random.random()
    if kind < 0.35:
        _draw_scribble(random, canvas, thickness=int(random.integers(1, 5)))
        return
    if kind < 0.55:
        blob = _draw_field(random, height, width, octaves=2)
        alpha = ((blob - 0.62) * 8).clip(0, 1)
        top = left = 0
    else:
        outline = _Outline([_regular(4 if kind < 0.8 else 64)], [])
        if kind < 0.8:
            outline.filled[0][:] = outline.filled[0] @ _rotation(np.pi / 4).T
        size = random.uniform(15, 110)
        placed = _place(random, outline, size, height, width, (0.2, 0.45))
        if placed is None:
            return
        alpha, (top, left), _ = placed
    region = canvas[:, top : top + alpha.shape[0], left : left + alpha.shape[1]]
    _paint(random, region, alpha, _find_dull_colour(random))


def _draw_scribble(random: Random, canvas: FloatArray, *, thickness: int) -> None:
    height, width = canvas.shape[1:]
    start = random.uniform([0, 0], [width, height])
    steps = random.normal(0, random.uniform(8, 60), (int(random.integers(1, 7)), 2))
    points = np.concatenate([start[None], start + steps.cumsum(0)])
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    draw.line([tuple(p) for p in points.tolist()], 255, thickness, joint="curve")
    canvas[:, np.asarray(mask) > 0] = _find_dull_colour(random)[:, None]


def _draw_texture(random: Random, height: int, width: int) -> FloatArray:
    """(3, height, width) background between three dull colours."""
    first, second, third = (_find_dull_colour(random) for _ in range(3))
    kind = random.random()
    if kind < 0.4:
        pattern = _draw_field(random, height, width, octaves=5)
    elif kind < 0.6:
        pattern = _draw_gradient(random, height, width)
    else:
        pattern = _draw_stripes(random, height, width)
        if kind > 0.8:
            pattern = np.abs(pattern - _draw_stripes(random, height, width))
    grain = _draw_field(random, height, width, octaves=6) - 0.5
    base, to_second, to_third = np.stack([first, second - first, third - first]).astype(np.float32)[
        ..., None, None
    ]
    return base + pattern * to_second + grain * to_third


def _draw_field(random: Random, height: int, width: int, *, octaves: int) -> FloatArray:
    """(height, width) smooth noise in [0, 1], each octave twice as fine and less strong."""
    persistence = random.uniform(0.5, 0.8)
    total = random.random((3, 3), np.float32)
    for octave in range(1, octaves):
        cells = 3 * 2**octave
        finer = random.random((cells, cells), np.float32)
        total = _enlarge(total, cells, cells) + np.float32(persistence**octave) * finer
    total = _enlarge(total, height, width)
    low, high = total.min(), total.max()
    return (total - low) / max(high - low, 1e-6)


def _enlarge(field: FloatArray, height: int, width: int) -> FloatArray:
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))


def _draw_gradient(random: Random, height: int, width: int) -> FloatArray:
    """(height, width) ramp from 0 to 1 in a random direction."""
    ramp = _project(random, height, width)
    return (ramp - ramp.min()) / max(np.ptp(ramp), 1e-6)


def _draw_stripes(random: Random, height: int, width: int) -> FloatArray:
    """(height, width) stripes between 0 and 1, with soft edges, in a random direction."""
    frequency = 2 * np.pi / np.exp(random.uniform(np.log(5), np.log(40)))
    phase, steepness = random.uniform([0, 0.7], [2 * np.pi, 3]).astype(np.float32)
    wave = np.sin(_project(random, height, width) * np.float32(frequency) + phase)
    return (0.5 + wave * steepness).clip(0, 1)


def _project(random: Random, height: int, width: int) -> FloatArray:
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.ogrid[0 : np.float32(height), 0 : np.float32(width)]
    return np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y


def _find_vivid_colour(random: Random, hue: float) -> FloatArray:
    """(3,) a strong colour of a hue from 0 to 1."""
    rgb = hsv_to_rgb(hue % 1, random.uniform(0.55, 0.95), random.uniform(0.5, 0.95))
    return 255 * np.array(rgb, np.float32)


def _find_dull_colour(random: Random) -> FloatArray:
    """(3,) a grey with a touch of colour, as backgrounds and what is no class have it."""
    rgb = hsv_to_rgb(random.random(), random.uniform(0, 0.25), random.uniform(0.2, 0.95))
    return 255 * np.array(rgb, np.float32)


def _find_colour_near(random: Random, region: FloatArray, alpha: FloatArray) -> FloatArray:
    """(3,) a colour that differs a little from what a shape would cover."""
    behind = np.tensordot(region, alpha, 2) / max(alpha.sum(), 1e-6)
    step = random.normal(0, 1, 3) + random.normal(0, 1)  # as much in brightness as in hue
    step *= random.uniform(28, 45) / np.linalg.norm(step)
    colour = np.where(behind + step > 250, behind - step, behind + step)
    return colour.clip(5, 250).astype(np.float32)


def _rotation(angle: float) -> FloatArray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _write_set(folder: Path, recipe: Recipe) -> None:
    (folder / "annotations").mkdir(parents=True)
    for split, num_images in (("train", recipe.num_train), ("val", recipe.num_val)):
        images_dir = folder / "images" / split
        images_dir.mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, num_images + 1):
            random = np.random.default_rng([recipe.seed, _SPLIT_SEEDS[split], image_id])
            image, found = draw_image(random, recipe)
            name = f"{image_id:05d}.jpg"
            image.save(images_dir / name, quality=int(random.integers(50, 95)))
            images.append(
                {"id": image_id, "file_name": name, "width": image.width, "height": image.height}
            )
            annotations += [
                {"id": len(annotations) + k, "image_id": image_id, "iscrowd": 0, **record}
                for k, record in enumerate(found, start=1)
            ]
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    for split, num_images in (("train", recipe.num_train), ("val", recipe.num_val)):
        if not (folder / "annotations" / f"instances_{split}.json").is_file():
            return False
        images_dir = folder / "images" / split
        if not images_dir.is_dir() or len(os.listdir(images_dir)) < num_images:
            return False
    return True
