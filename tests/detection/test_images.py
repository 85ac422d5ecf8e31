from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.images import UnreadableImage, load_annotated_image, load_image

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
    assert np.abs(np.asarray(load_image(path)).astype(int) - 100).max() <= 1


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path: Path):
    path = tmp_path / "image.png"
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(path, transparency=bytes([0, 128]))
    assert load_image(path).getpixel((3, 3)) == RED


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


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "image.png"
    with pytest.raises(UnreadableImage, match="No such file"):
        load_image(path)
    path.write_bytes(b"")
    with pytest.raises(UnreadableImage, match="not an image"):
        load_image(path)
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        load_image(path)
