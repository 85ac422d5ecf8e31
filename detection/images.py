"""Pictures from files, whatever their colours and orientation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from detection.errors import UserError

PICTURE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
ImageLike = str | Path | Image.Image | np.ndarray
# EXIF orientations that turn a picture by a quarter.
SIDEWAYS = (5, 6, 7, 8)


class UnreadableImage(Exception):
    """An image file that gives no picture, or not the one that the annotations describe."""


class MismatchedSize(UnreadableImage):
    """A picture of another size than the annotations state."""


def open_images(images: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """RGB pictures, of one or several paths, PIL images, or uint8 arrays (H, W, 3) or (H, W).

    Raises:
        UserError: where one cannot be read, or is an array of another type or shape.
    """
    if isinstance(images, (str, Path, Image.Image, np.ndarray)):
        return [_open_image(images)]
    return [_open_image(image) for image in images]


def _open_image(image: ImageLike) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UserError(f"an image array must be uint8, got {image.dtype}")
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (2,), (3,), (4,)):
            raise UserError(f"an image array must be (H, W, 3) or (H, W), got {image.shape}")
        image = Image.fromarray(image)
    try:
        if not isinstance(image, Image.Image):
            return load_image(image)
        with _one_error():
            return _to_rgb(image)
    except UnreadableImage as error:
        raise UserError(f"cannot read {image}: {error}") from error


def load_image(path: str | Path | BinaryIO) -> Image.Image:
    """The picture as a viewer shows it: RGB, turned as its EXIF orientation says.

    Raises:
        UnreadableImage: with the reason, if the file is missing, broken, or no image.
    """
    return _read(path, ImageOps.exif_transpose)


def load_annotated_image(
    path: str | Path, size: tuple[int, int], *, least_side: int | None = None
) -> Image.Image:
    """The picture that annotations of this (height, width) describe, RGB.

    Annotation tools disagree about EXIF orientation: the picture is turned only where that gives
    the stated size and leaving it does not.

    Args:
        least_side: where given, a JPEG is decoded at the half, a quarter or an eighth of its size
            as long as its shorter side stays at least so long, which is quicker; sides are rounded
            up.

    Raises:
        UnreadableImage: with the reason, if the file is broken.
        MismatchedSize: if it is of another size.
    """
    height, width = size

    def turn(image: Image.Image) -> Image.Image:
        turns = image.size != (width, height)
        if turns and not (
            image.size == (height, width)
            and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        ):
            raise MismatchedSize(
                f"it is {image.width} x {image.height}, the annotations say {width} x {height}"
            )
        if least_side is not None and min(size) >= 2 * least_side:
            scale = max(scale for scale in (2, 4, 8) if min(size) >= scale * least_side)
            image.draft(None, (image.width // scale, image.height // scale))
        return ImageOps.exif_transpose(image) if turns else image

    return _read(path, turn)


def shrink_size(size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """(height, width) of a picture whose shorter side is shrunk to this where it is longer."""
    shorter = min(size)
    if shorter_side is None or shorter <= shorter_side:
        return size
    height, width = ((2 * side * shorter_side + shorter) // (2 * shorter) for side in size)
    return height, width


def _read(path: str | Path | BinaryIO, turn: Callable[[Image.Image], Image.Image]) -> Image.Image:
    with _one_error(), Image.open(path) as image:
        return _to_rgb(turn(image))


@contextmanager
def _one_error() -> Iterator[None]:
    """`UnreadableImage` for all that Pillow raises."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("it is not an image") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImage(f"it exceeds the limit of {limit:,} pixels: shrink it") from None
    except Exception as error:
        # Pillow's decoders answer a broken file with almost any exception.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(" ".join(reason.split())) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise UnreadableImage("it has no pixels")
    if image.mode == "F":  # convert() would take 0 to 1 for black
        raise UnreadableImage("its pixels are floats of no known range: save it with whole numbers")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        values = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode == "P":  # an RGBA palette is not understood by convert("RGB")
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
