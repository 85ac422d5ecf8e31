from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detection.detector import Detector
from detection.errors import UserError
from detection.visualization.frames import draw_frames
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


def test_an_image(draw: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    monkeypatch.setattr("detection.engine.memory.keep_freed_memory", lambda: asked.append(True))
    (picture,) = draw(f"source={save_noise(tmp_path / 'a.jpg', (500, 400))}")
    assert picture == tmp_path / "out" / "a.jpg"
    assert Image.open(picture).size == (500, 400)
    assert asked == [True]


def test_a_folder_with_json(draw: Callable[..., list[Path]], tmp_path: Path):
    save_noise(tmp_path / "in" / "a.jpg", (500, 400))
    save_noise(tmp_path / "in" / "b" / "c.png", (300, 600))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    written = draw(f"source={tmp_path / 'in'}", "save_json=true", "format=png")
    assert all(path.exists() for path in written)
    assert [path.suffix for path in written] == [".png", ".png", ".json"]
    # A data set of its own: what COCO tools read without any other file.
    ours = COCO(str(written[-1]))
    assert [(own["id"], own["file_name"]) for own in ours.dataset["images"]] == [
        (1, "a.jpg"),
        (2, "b/c.png"),
    ]
    assert {own["name"] for own in ours.dataset["categories"]} >= {"circle"}
    assert len(ours.anns) == len(ours.dataset["annotations"]) > 0
    for record in ours.dataset["annotations"]:
        x, y, width, height = record["bbox"]
        image = ours.imgs[record["image_id"]]
        assert x >= 0 and y >= 0 and 0 <= record["score"] <= 1
        assert x + width <= image["width"] + 0.01 and y + height <= image["height"] + 0.01
    predictions = COCO(str(written[-1])).loadRes(ours.dataset["annotations"])
    assert len(predictions.anns) == len(ours.anns)


def test_a_video(draw: Callable[..., list[Path]], tmp_path: Path):
    with VideoWriter(tmp_path / "in.mp4", Fraction(10)) as video:
        for number in range(5):
            video.write(Image.new("RGB", (480, 320), (50 * number, 90, 90)))
    (drawn,) = draw(f"source={tmp_path / 'in.mp4'}", "batch_size=2")
    source = read_source(drawn)
    assert len(list(source)) == 5 and source.fps == 10


def test_the_end_of_a_video_that_never_ends(draw: Callable[..., list[Path]], tmp_path: Path):
    with VideoWriter(tmp_path / "in.mp4", 10) as video:
        for _ in range(9):
            video.write(Image.new("RGB", (480, 320)))
    (drawn,) = draw(f"source={tmp_path / 'in.mp4'}", "batch_size=2", "max_images=5")
    assert len(list(read_source(drawn))) == 5


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_frames_drawn_so_far_are_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    with VideoWriter(tmp_path / "in.mp4", 10) as video:
        for _ in range(9):
            video.write(Image.new("RGB", (480, 320)))
    detector = Detector.from_checkpoint(trained / "checkpoints" / "best.pt")
    source = read_source(tmp_path / "in.mp4")
    frames = draw_frames(detector, source, tmp_path / "out", batch_size=2)
    for _ in range(4):
        next(frames)
    if how == "closed":
        frames.close()
    else:
        monkeypatch.setattr(detector, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(frames)
    assert len(list(read_source(tmp_path / "out" / "in.mp4"))) == 4


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


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
        (["batch_size=0"], "batch_size=0: give at least 1"),
        (["score_threshold=40"], "score_threshold=40: give one from 0 to 1"),
        (["checkpoint=base.onnx"], r"base\.onnx: give a checkpoint of train_det\.py"),
        (["max_images=-1"], "max_images=-1: give at least 1, or null"),
        (["source=0", "routing=true"], "routing=true is of a split"),
        (["source=null", "save_json=true"], "save_json=true is of a source"),
        (["output=/dev/null/x"], r"output=/dev/null/x: cannot write there"),
        (["device=cuda:7"], "GPU 7 is not there"),
    ],
)
def test_mistakes(draw: Callable[..., list[Path]], overrides: list[str], answer: str):
    with pytest.raises(UserError, match=answer):
        draw(*overrides)
