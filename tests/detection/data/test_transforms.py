from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detection.augmentation import Augmentation
from detection.data.transforms import (
    EvalTransform,
    RandomObjectCoverageCrop,
    TrainTransform,
    ZoomOut,
)

HEIGHT, WIDTH = 60, 80
NO_BOXES: list[list[float]] = []


@pytest.fixture(autouse=True)
def one_thread():
    """As in a worker; on a busy machine several threads make tiny operations very slow."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def resize(image: Any, boxes: Any) -> Any:
    return F.resize(image, [32, 32], antialias=True), F.resize(boxes, [32, 32])


def make_image() -> tv_tensors.Image:
    """Each pixel tells where it came from: red is the column, green the row."""
    rows = torch.arange(HEIGHT, dtype=torch.uint8)[:, None].expand(HEIGHT, WIDTH)
    columns = torch.arange(WIDTH, dtype=torch.uint8)[None].expand(HEIGHT, WIDTH)
    return tv_tensors.Image(torch.stack([columns, rows, torch.full_like(rows, 200)]))


def make_boxes(boxes: list[list[float]]) -> Any:
    values = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return tv_tensors.BoundingBoxes(values, format="XYXY", canvas_size=(HEIGHT, WIDTH))  # pyright: ignore


BOXES = [[5.0, 5, 25, 30], [40, 20, 79, 59], [60, 2, 66, 8]]


@pytest.mark.parametrize("min_coverage", [0.0, 0.5, 1.0])
def test_crop_keeps_covered_boxes_in_place(min_coverage: float):
    crop = RandomObjectCoverageCrop(min_coverages=(min_coverage,), keep_probability=0.0)
    dropped = 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, boxes = crop(make_image(), make_boxes(BOXES))
        left, top = image[0, 0, 0].item(), image[1, 0, 0].item()
        height, width = image.shape[-2:]
        assert boxes.canvas_size == (height, width)
        coverages = []
        for (x1, y1, x2, y2), after in zip(BOXES, boxes.tolist(), strict=True):
            expected = [
                min(max(x1 - left, 0), width),
                min(max(y1 - top, 0), height),
                min(max(x2 - left, 0), width),
                min(max(y2 - top, 0), height),
            ]
            inside = (expected[2] - expected[0]) * (expected[3] - expected[1])
            coverage = inside / ((x2 - x1) * (y2 - y1))
            coverages.append(coverage)
            kept = coverage > 0 and coverage >= min_coverage - 1e-6
            assert after == (expected if kept else [0, 0, 0, 0])
            dropped += not kept
        assert max(coverages) >= min_coverage - 1e-6
    assert dropped > 10


def test_windows_stay_in_bounds():
    torch.manual_seed(0)
    crop = RandomObjectCoverageCrop(num_attempts=20_000)
    windows = crop.draw_windows(HEIGHT, WIDTH)
    width, height = (windows[:, 2:] - windows[:, :2]).T
    assert len(windows) > 19_000
    assert (
        (windows >= 0).all() and (windows[:, 2] <= WIDTH).all() and (windows[:, 3] <= HEIGHT).all()
    )
    assert windows.equal(windows.round())
    area = width * height / (HEIGHT * WIDTH)
    assert area.min() >= 0.1 and area.max() <= 1
    assert area.max() > 0.95 and area.min() < 0.11
    ratio = width / height
    # The sides are whole pixels, so the ratio may pass its bounds by a rounding.
    assert ratio.min() > 0.47 and ratio.max() < 2.1
    assert abs(ratio.mean() - 1.25) < 0.02
    # At a ratio near 1 the height is uniform between the root of a tenth of the area and the image.
    heights = height[(ratio - 1).abs() < 0.02]
    assert heights.min() <= 24 and heights.max() == HEIGHT
    assert abs(heights.mean() - 41) < 1.5


def test_every_coverage_is_chosen_equally_and_some_images_stay_whole():
    torch.manual_seed(0)
    # Any window does for coverage 0, and none is the whole image: only the probability keeps it.
    crop = RandomObjectCoverageCrop(min_coverages=(0.0,), areas=(0.1, 0.5))
    image, boxes = make_image(), make_boxes([[0, 0, WIDTH, HEIGHT]])
    whole = sum(crop(image, boxes)[0].shape == image.shape for _ in range(600))
    assert 0.10 < whole / 600 < 0.20

    # No window of at most half of the image covers it, so only coverage 0 ever crops.
    crop = RandomObjectCoverageCrop(
        min_coverages=(0.0, 0.9, 1.0), areas=(0.1, 0.5), keep_probability=0.0
    )
    whole = sum(crop(image, boxes)[0].shape == image.shape for _ in range(600))
    assert 0.60 < whole / 600 < 0.73


def test_crop_without_boxes():
    crop = RandomObjectCoverageCrop(keep_probability=0.0, min_coverages=(0.3,))
    for seed in range(20):
        torch.manual_seed(seed)
        image, boxes = crop(make_image(), make_boxes(NO_BOXES))
        assert boxes.shape == (0, 4)
        assert image.shape[-2] * image.shape[-1] >= 0.3 * HEIGHT * WIDTH
        assert image.shape[-2:] != (HEIGHT, WIDTH)


def test_zoom_out_is_torchvisions():
    """The canvas lies in memory as a decoded image does."""
    fill = (123, 117, 104)
    ours, theirs = (own(fill=fill) for own in (ZoomOut, v2.RandomZoomOut))
    sizes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, boxes = ours(make_image(), make_boxes(BOXES))
        torch.manual_seed(seed)
        expected, expected_boxes = theirs(make_image(), make_boxes(BOXES))
        assert image.equal(expected) and boxes.equal(expected_boxes)
        assert boxes.canvas_size == expected_boxes.canvas_size == image.shape[-2:]
        if image.shape[-2:] != (HEIGHT, WIDTH):
            assert image.permute(1, 2, 0).is_contiguous()
        sizes.add(image.shape)
    assert len(sizes) > 10


@pytest.mark.parametrize("boxes", [NO_BOXES, BOXES])
@pytest.mark.parametrize("every", [0.0, 1.0])
def test_train_transform(boxes: list[list[float]], every: float):
    transform = TrainTransform(
        Augmentation(
            crop="ssd" if every else "none",
            horizontal_flip=every,
            vertical_flip=every,
            photometric=every,
            zoom_out=every,
        ),
        resize=resize,
    )
    torch.manual_seed(1)
    labels = torch.arange(len(boxes))
    image, after, after_labels = transform(make_image(), make_boxes(boxes), labels)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert len(after) == len(after_labels) <= len(boxes)
    assert after_labels.dtype == torch.int64
    assert (after[:, 2:] > after[:, :2]).all() and (after >= 0).all() and (after <= 32).all()
    if not every:
        plain_image, plain_boxes, _ = EvalTransform(resize=resize)(
            make_image(), make_boxes(boxes), labels
        )
        assert image.equal(plain_image) and after.equal(plain_boxes)


def test_flips_move_boxes_with_pixels():
    transform = TrainTransform(
        Augmentation(crop="none", horizontal_flip=1, vertical_flip=1), resize=resize
    )
    image, boxes, _ = transform(make_image(), make_boxes([[0, 0, 20, 15]]), torch.zeros(1).long())
    assert boxes.tolist() == [[24, 24, 32, 32]]
    assert image[0, 0, 0] > image[0, 0, -1] and image[1, 0, 0] > image[1, -1, 0]


def test_colours_change_and_nothing_moves():
    transform = TrainTransform(
        Augmentation(crop="none", horizontal_flip=0, photometric=1), resize=resize
    )
    plain = TrainTransform(Augmentation(crop="none", horizontal_flip=0), resize=resize)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=random)
    labels = torch.arange(len(BOXES))
    torch.manual_seed(0)
    image, boxes, _ = transform(tv_tensors.Image(pixels), make_boxes(BOXES), labels)
    expected, expected_boxes, _ = plain(tv_tensors.Image(pixels), make_boxes(BOXES), labels)
    assert image.shape == expected.shape and image.dtype == torch.uint8
    assert boxes.equal(expected_boxes) and not image.equal(expected)
    brightness = torch.stack([image.float().mean(0).flatten(), expected.float().mean(0).flatten()])
    assert torch.corrcoef(brightness)[0, 1] > 0.8


def test_labels_go_with_their_boxes():
    transform = TrainTransform(Augmentation(horizontal_flip=0.0), resize=resize)
    for seed in range(40):
        torch.manual_seed(seed)
        _, boxes, labels = transform(make_image(), make_boxes(BOXES), torch.tensor([4, 5, 6]))
        torch.manual_seed(seed)
        _, everything = resize(*RandomObjectCoverageCrop()(make_image(), make_boxes(BOXES)))
        areas: Tensor = (everything[:, 2:] - everything[:, :2]).prod(1)
        assert labels.equal(torch.tensor([4, 5, 6])[areas > 0])
        assert len(boxes) == len(labels)


def test_max_boxes():
    transform = TrainTransform(
        Augmentation(crop="none", horizontal_flip=0.0, max_boxes=2), resize=resize
    )
    _, boxes, labels = transform(make_image(), make_boxes(BOXES), torch.tensor([4, 5, 6]))
    assert labels.tolist() == [4, 5] and len(boxes) == 2
