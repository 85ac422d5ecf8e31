"""Pictures from files, whatever their colours and orientation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from detection.errors import UserError

PICTURE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
ImageLike = str | Path | Image.Image | np.ndarray


class UnreadableImage(Exception):
    """An image file that gives no picture, or not the one that the annotations describe."""


class MismatchedSize(UnreadableImage):
    """A picture of another size than the annotations state."""


def open_images(images: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """RGB pictures, of one or several paths, PIL images, or uint8 arrays (H, W, 3) or (H, W).

    Raises:
        UserError: where one cannot be read, or is an array of another type.
    """
    if isinstance(images, (str, Path, Image.Image, np.ndarray)):
        return [_open_image(images)]
    return [_open_image(image) for image in images]


def _open_image(image: ImageLike) -> Image.Image:
    if isinstance(image, (str, Path)):
        try:
            return load_image(image)
        except UnreadableImage as error:
            raise UserError(f"cannot read {image}: {error}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UserError(f"an image array must be uint8, got {image.dtype}")
        image = Image.fromarray(image)
    return image.convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """The picture as a viewer shows it: RGB, turned as its EXIF orientation says.

    Raises:
        UnreadableImage: with the reason, if the file is missing, broken, or no image.
    """
    return _read(path, ImageOps.exif_transpose)


def load_annotated_image(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """The picture that annotations of this (height, width) describe, RGB.

    Annotation tools disagree about EXIF orientation: the picture is turned only where that gives
    the stated size and leaving it does not.

    Raises:
        UnreadableImage: with the reason, if the file is broken.
        MismatchedSize: if it is of another size.
    """
    height, width = size

    def turn(image: Image.Image) -> Image.Image:
        stored = image.size
        if stored != (width, height):
            image = ImageOps.exif_transpose(image)
        if image.size != (width, height):
            raise MismatchedSize(
                f"it is {stored[0]} x {stored[1]}, the annotations say {width} x {height}"
            )
        return image

    return _read(path, turn)


def _read(path: str | Path, turn: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _to_rgb(turn(image))
    except MismatchedSize:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("it is not an image") from None
    except Exception as error:
        # Pillow's decoders answer a broken file with almost any exception.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(" ".join(reason.split())) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        values = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode == "P":  # an RGBA palette is not understood by convert("RGB")
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
