from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detection.build import ModelParts
from detection.detector import Detector, unbatch
from detection.errors import UserError
from detection.preprocess import Letterbox
from detection.structures import Category, Detections


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return Detector.from_checkpoint(trained / "checkpoints" / "best.pt")


def noise(width: int, height: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_detection_does_not_depend_on_the_other_images(detector: Detector):
    images = [noise(100, 60, 0), noise(64, 64, 1), noise(50, 200, 2)]
    together = detector.predict(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector.predict(image)
        torch.testing.assert_close(alone.scores, found.scores, atol=1e-5, rtol=1e-4)


def test_boxes_are_in_pixels_of_the_image(detector: Detector):
    image = noise(64, 64, 0)
    enlarged = np.asarray(Image.fromarray(image).resize((640, 128), Image.Resampling.NEAREST))
    (small,), (large,) = detector.predict(image), detector.predict(enlarged)
    assert large.boxes[:, 2].max() <= 640 and large.boxes[:, 3].max() <= 128
    assert large.boxes[:, 2].max() > 64
    assert len(small.boxes) > 0


def test_what_lies_in_the_padding_is_no_detection():
    boxes = torch.tensor([[[0.0, 40, 64, 60], [0, 20, 30, 40], [0, 0, 30, 30]]])
    found = Detections(boxes, torch.ones(1, 3), torch.arange(3)[None], torch.ones(1, 3).bool())
    preprocess = Letterbox(input_size=64)
    parts = ModelParts(nn.Identity(), preprocess, nn.Identity(), lambda *_: found)  # pyright: ignore
    predictions: Any = None
    (own,) = unbatch(Detector(parts, []).decode(predictions, torch.tensor([[32, 64]])))
    assert own.labels.tolist() == [1, 2]
    assert own.boxes.tolist() == [[0, 20, 30, 32], [0, 0, 30, 30]]


def test_every_kind_of_image(detector: Detector, tmp_path: Path):
    array = noise(80, 60, 0)
    Image.fromarray(array).save(tmp_path / "a.png")
    kinds = [array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png")]
    first, *others = detector.predict(kinds)
    for other in others:
        assert torch.equal(first.boxes, other.boxes)
    assert len(detector.predict(array[:, :, 0])) == 1
    assert detector.predict([]) == []


def test_the_threshold_cuts(detector: Detector):
    image = noise(80, 60, 0)
    (everything,) = detector.predict(image)
    threshold = float(everything.scores[len(everything.scores) // 2])
    (some,) = detector.predict(image, score_threshold=threshold)
    assert len(some.scores) == int((everything.scores >= threshold).sum())
    assert (everything.scores.diff() <= 0).all()


def test_images_that_cannot_be_read(detector: Detector, tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*a\.jpg"):
        detector.predict(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        detector.predict(noise(8, 8, 0), batch_size=0)
    with pytest.raises(UserError, match="must be uint8"):
        detector.predict(np.zeros((8, 8, 3), np.float32))


def test_classes_are_matched_by_name(detector: Detector):
    names = detector.names
    categories = [Category(9, names[3]), Category(4, names[0])]
    assert detector.match_categories(categories).tolist() == [3, 0]
    with pytest.raises(UserError, match="none named 'zebra'"):
        detector.match_categories([Category(1, "zebra")])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_stream_gives_each_image_with_its_detections(detector: Detector, batch_size: int):
    images = [noise(100, 60 + i, i) for i in range(5)]
    expected = detector.predict(images)
    pairs = list(detector.stream(iter(images), batch_size=batch_size))
    assert [picture.height for picture, _ in pairs] == [60, 61, 62, 63, 64]
    for (_, found), one in zip(pairs, expected, strict=True):
        torch.testing.assert_close(found.scores, one.scores, atol=1e-5, rtol=1e-4)
        assert found.names == tuple(detector.names)


def test_a_stream_reads_no_more_than_two_batches_ahead(detector: Detector):
    read = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            read.append(len(read))
            yield noise(40, 30, 0)

    pairs = detector.stream(endless(), batch_size=2)
    next(pairs)
    assert len(read) <= 6
    pairs.close()
    assert not any(thread.name.startswith("read") for thread in threading.enumerate())


def test_an_image_that_cannot_be_read_ends_a_stream(detector: Detector, tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    pairs = detector.stream([noise(40, 30, 0), tmp_path / "a.jpg"], batch_size=1)
    next(pairs)
    with pytest.raises(UserError, match=r"cannot read .*a\.jpg"):
        next(pairs)


def test_supervision_takes_detections(detector: Detector):
    """The recipe of the README."""
    (found,) = detector.predict(noise(80, 60, 0))
    fields = {
        "xyxy": found.boxes.numpy(),
        "confidence": found.scores.numpy(),
        "class_id": found.labels.numpy(),
        "data": {"class_name": np.array(found.names)[found.labels.numpy()]},
    }
    num = len(found.scores)
    assert num > 0
    # What `supervision.Detections` checks: float boxes (N, 4), and arrays of N beside them.
    assert fields["xyxy"].shape == (num, 4) and fields["xyxy"].dtype == np.float32
    assert fields["confidence"].shape == fields["class_id"].shape == (num,)
    assert fields["data"]["class_name"].shape == (num,)
    supervision = pytest.importorskip("supervision")
    theirs = supervision.Detections(**fields)
    assert len(theirs) == num and theirs["class_name"][0] == found.names[int(found.labels[0])]
    assert len(theirs[theirs.confidence > 1]) == 0
