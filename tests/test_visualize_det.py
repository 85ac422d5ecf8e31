from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.errors import UserError
from detection.visualization.media import VideoWriter, read_source
from visualize_det import visualize


@pytest.fixture
def draw(
    compose_config: Callable[..., Any], trained: Path, tmp_path: Path
) -> Callable[..., list[Path]]:
    """Visualizes in this process, into `tmp_path / "out"`, showing everything detected."""

    def draw(*overrides: str) -> list[Path]:
        common = [
            f"checkpoint={trained / 'checkpoints' / 'best.pt'}",
            f"output={tmp_path / 'out'}",
            "score_threshold=0",
            "device=cpu",
        ]
        return visualize(compose_config("visualize", [*common, *overrides]))

    return draw


def save_noise(path: Path, size: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


def test_an_image(draw: Callable[..., list[Path]], tmp_path: Path):
    (picture,) = draw(f"source={save_noise(tmp_path / 'a.jpg', (500, 400))}")
    assert picture == tmp_path / "out" / "a.jpg"
    assert Image.open(picture).size == (500, 400)


def test_a_folder_with_json(draw: Callable[..., list[Path]], tmp_path: Path):
    save_noise(tmp_path / "in" / "a.jpg", (500, 400))
    save_noise(tmp_path / "in" / "b" / "c.png", (300, 600))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    written = draw(f"source={tmp_path / 'in'}", "save_json=true", "format=png")
    assert all(path.exists() for path in written)
    pictures, table = written[:-1], json.loads(written[-1].read_text())
    assert [path.suffix for path in pictures] == [".png", ".png"]
    assert {record["file_name"] for record in table} == {"a.jpg", "b/c.png"}
    for record in table:
        x, y, width, height = record["bbox"]
        size = (500, 400) if record["file_name"] == "a.jpg" else (300, 600)
        assert x >= 0 and y >= 0
        assert x + width <= size[0] + 0.01 and y + height <= size[1] + 0.01


def test_a_video(draw: Callable[..., list[Path]], tmp_path: Path):
    with VideoWriter(tmp_path / "in.mp4", Fraction(10)) as video:
        for number in range(5):
            video.write(Image.new("RGB", (480, 320), (50 * number, 90, 90)))
    (drawn,) = draw(f"source={tmp_path / 'in.mp4'}", "batch_size=2")
    source = read_source(drawn)
    assert len(list(source)) == 5 and source.fps == 10


def test_a_split_beside_its_ground_truth(draw: Callable[..., list[Path]], trained: Path):
    written = draw("max_images=2")
    assert len(written) == 2
    assert all(picture.exists() for picture in written)
    # Two pictures beside each other.
    assert Image.open(written[0]).width > 1.5 * Image.open(written[0]).height * 64 / 80


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["source=/no/such/file.jpg"], "does not exist"),
        (["source=null", "format=gif"], "give jpg or png"),
        (["checkpoint=null"], "checkpoint is not set"),
        (["device=cuda:7"], "GPU 7 is not there"),
    ],
)
def test_mistakes(draw: Callable[..., list[Path]], overrides: list[str], answer: str):
    with pytest.raises(UserError, match=answer):
        draw(*overrides)
