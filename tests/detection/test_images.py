from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.errors import UserError
from detection.images import (
    UnreadableImage,
    load_annotated_image,
    load_image,
    open_images,
    shrink_size,
)

RED = (200, 40, 30)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "jpg"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("P", "gif"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "tif"),
    ],
)
def test_colour_modes(tmp_path: Path, mode: str, suffix: str):
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (8, 6), RED).convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    for image in (load_image(path), load_annotated_image(path, (6, 8))):
        assert image.mode == "RGB" and image.size == (8, 6)
        assert np.abs(np.asarray(image).astype(int) - RED).max() < 16


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.new("L", (8, 6), 100), "jpg"),
        (Image.new("LA", (8, 6), (100, 3)), "png"),
        (Image.fromarray(np.full((6, 8), 100 * 256 + 9, np.uint16)), "png"),
        (Image.fromarray(np.full((6, 8), 100 * 256 + 9, np.int32)), "tif"),
    ],
)
def test_grey_images(tmp_path: Path, image: Image.Image, suffix: str):
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    for picture in (load_image(path), *open_images([image, path])):
        assert np.abs(np.asarray(picture).astype(int) - 100).max() <= 1


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path: Path):
    path = tmp_path / "image.png"
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(path, transparency=bytes([0, 128]))
    with Image.open(path) as image:
        for picture in (load_image(path), *open_images(image)):
            assert picture.getpixel((3, 3)) == RED


def test_floats_are_refused(tmp_path: Path):
    image = Image.new("F", (8, 6), 0.5)
    image.save(tmp_path / "image.tif")
    for source in (image, tmp_path / "image.tif"):
        with pytest.raises(UserError, match=r"cannot read .*its pixels are floats"):
            open_images(source)


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """Stored 8 wide and 6 high, shown 6 wide and 8 high; white at the left as it is stored."""
    image = Image.new("L", (8, 6))
    image.paste(255, (0, 0, 4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to show
    image.save(tmp_path / "image.png", exif=exif)
    return tmp_path / "image.png"


def test_exif_orientation_is_applied_where_the_size_says_so(turned: Path):
    stored = np.asarray(load_annotated_image(turned, (6, 8)))
    assert stored.shape == (6, 8, 3) and stored[:, 0].all() and not stored[:, -1].any()
    shown = np.asarray(load_annotated_image(turned, (8, 6)))
    assert shown.shape == (8, 6, 3) and shown[0].all() and not shown[-1].any()
    assert np.array_equal(shown, np.asarray(load_image(turned)))


def test_size_that_no_orientation_gives(turned: Path):
    with pytest.raises(UnreadableImage, match="it is 8 x 6, the annotations say 9 x 6"):
        load_annotated_image(turned, (6, 9))


def test_pictures_in_memory_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (40, 30), RED).save(path)
    path.write_bytes(path.read_bytes()[:1000])  # Pillow decodes, and finds out, when asked to
    with pytest.raises(UserError, match=r"cannot read .* truncated"), Image.open(path) as cut:
        open_images(cut)
    with pytest.raises(UserError, match=r"cannot read .*: it has no pixels"):
        open_images(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("shape", [(8,), (8, 6, 1), (8, 6, 5), (3, 8, 60), (2, 8, 6, 3)])
def test_arrays_of_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(UserError, match=r"must be \(H, W, 3\) or \(H, W\), got \("):
        open_images(np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="it has no pixels"):
        open_images(np.zeros((0, 6, 3), np.uint8))


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "image.png"
    with pytest.raises(UnreadableImage, match="No such file"):
        load_image(path)
    path.write_bytes(b"")
    with pytest.raises(UnreadableImage, match="not an image"):
        load_image(path)
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="exceeds the limit of 2,000 pixels: shrink it"):
        load_image(path)


def draw_square(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height), (20, 30, 40))
    image.paste((230, 220, 210), box)
    return image


def find_square(image: Image.Image) -> list[float]:
    """Its edges where the brightness is half way up, as parts of the width and height."""
    bright = np.asarray(image.convert("L")).astype(float)
    bright = (bright - bright.min()) / (bright.max() - bright.min())
    edges = []
    for axis in (0, 1):
        profile = bright.max(axis)
        inside = np.flatnonzero(profile > 0.5)
        edges += [inside[0] / len(profile), (inside[-1] + 1) / len(profile)]
    return [edges[0], edges[2], edges[1], edges[3]]


@pytest.mark.parametrize(
    ("width", "height", "least_side", "size"),
    [
        (640, 480, 480, (640, 480)),
        (640, 480, 241, (640, 480)),
        (640, 480, 240, (320, 240)),
        (640, 480, 160, (320, 240)),  # a third is between
        (640, 480, 120, (160, 120)),
        (640, 480, 60, (80, 60)),
        (640, 480, 7, (80, 60)),
        (1001, 667, 150, (251, 167)),  # rounded up
        (667, 1001, 80, (84, 126)),
    ],
)
@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_a_jpeg_is_decoded_at_a_part_of_its_size(
    tmp_path: Path,
    width: int,
    height: int,
    least_side: int,
    size: tuple[int, int],
    orientation: int | None,
):
    box = (width // 3, height // 4, width // 2, height - height // 5)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    stored = draw_square(width, height, box)
    stored.save(tmp_path / "image.jpg", exif=exif, quality=95)
    stored.save(tmp_path / "image.png", exif=exif)
    turned = orientation == 6
    stated = (width, height) if turned else (height, width)
    whole = load_annotated_image(tmp_path / "image.jpg", stated)
    assert whole.size == stated[::-1]
    image = load_annotated_image(tmp_path / "image.jpg", stated, least_side=least_side)
    assert image.size == (size[::-1] if turned else size)
    pixel = 1 / min(image.size)
    assert np.allclose(find_square(image), find_square(whole), atol=pixel)
    png = load_annotated_image(tmp_path / "image.png", stated, least_side=least_side)
    assert png.size == stated[::-1]
    assert np.array_equal(
        np.asarray(png), np.asarray(load_annotated_image(tmp_path / "image.png", stated))
    )


def test_the_stated_size_is_that_of_the_whole(tmp_path: Path):
    draw_square(64, 48, (0, 0, 9, 9)).save(tmp_path / "image.jpg")
    with pytest.raises(UnreadableImage, match="it is 64 x 48, the annotations say 32 x 24"):
        load_annotated_image(tmp_path / "image.jpg", (24, 32), least_side=24)


@pytest.mark.parametrize(
    ("size", "shorter_side", "expected"),
    [
        ((480, 640), None, (480, 640)),
        ((480, 640), 480, (480, 640)),
        ((480, 640), 600, (480, 640)),
        ((480, 640), 300, (300, 400)),
        ((1000, 333), 100, (300, 100)),
        ((7, 9), 1, (1, 1)),
    ],
)
def test_shrunk_sizes(size: tuple[int, int], shorter_side: int | None, expected: tuple[int, int]):
    assert shrink_size(size, shorter_side) == expected


def test_real_photographs_decoded_at_a_part_stay_in_place(real_data: Path):
    """What differs from the whole, shrunk, is far less than where it were a pixel aside."""
    side = 75
    for path in sorted((real_data / "coco128" / "images").iterdir())[:12]:
        with Image.open(path) as image:
            size = (image.height, image.width)
        height, width = shrink_size(size, side)
        whole, part = (
            np.asarray(
                load_annotated_image(path, size, least_side=least_side).resize(
                    (width, height), Image.Resampling.BILINEAR
                )
            ).astype(int)
            for least_side in (None, side)
        )
        moved = np.abs(whole[:, 1:] - part[:, :-1]).mean()
        assert 0 < np.abs(whole - part).mean() < 0.6 * moved
