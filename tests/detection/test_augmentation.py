from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as T

from detection.augmentation import (
    MIN_COVERAGES,
    NUM_CHOICES,
    Augmentation,
    BatchAugmentation,
    resize_batch,
)
from detection.boxes import pairwise_coverage
from detection.preprocess import Letterbox, Preprocess
from detection.structures import Targets

# pyright: reportCallIssue=false, reportArgumentType=false
SIZE = 96
COLOURS = torch.tensor(
    [[255.0, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]]
)
# Of a colour's channels none is near it, nor near the mean.
BACKGROUND = 128
PREPROCESS = {
    "stretch": Preprocess(input_size=SIZE),
    "letterbox": Letterbox(input_size=SIZE),
    "centred": Letterbox(input_size=SIZE, centered=True),
}
SIZES = [(200, 300), (300, 220), (240, 240), (120, 160)]
OFF = {"crop": "none", "horizontal_flip": 0.0}


def make_batch(
    augmentation: BatchAugmentation, seed: int = 0, *, max_colours: int = 6
) -> tuple[Tensor, Targets, Tensor, Tensor]:
    """Images with coloured rectangles, some more and some less, loaded; and random numbers."""
    generator = torch.Generator().manual_seed(seed)
    images, all_boxes, all_labels = [], [], []
    for place, (height, width) in enumerate(SIZES):
        image = torch.full((3, height, width), BACKGROUND, dtype=torch.uint8)
        boxes, labels = [], []
        # Each colour in a cell of its own, of three columns and two rows.
        for label in range(min((6, 3, 0, 5)[place], max_colours)):
            at = torch.rand(4, generator=generator)
            x, y = (label % 3) * width // 3, (label // 3) * height // 2
            x1, y1 = x + int(at[0] * width / 10) + 3, y + int(at[1] * height / 8) + 3
            x2, y2 = x1 + int((0.1 + at[2] / 10) * width), y1 + int((0.15 + at[3] / 6) * height)
            image[:, y1:y2, x1:x2] = COLOURS[label].byte()[:, None, None]
            boxes.append([float(v) for v in (x1, y1, x2, y2)])
            labels.append(label)
        wrapped = tv_tensors.BoundingBoxes(
            torch.tensor(boxes).view(-1, 4), format="XYXY", canvas_size=(height, width)
        )
        pixels, moved = augmentation.loaded.resize(tv_tensors.Image(image), wrapped)
        images.append(pixels.as_subclass(Tensor))
        all_boxes.append(F.pad(moved.as_subclass(Tensor), (0, 0, 0, 7 - len(boxes))))
        all_labels.append(torch.tensor(labels + [0] * (7 - len(boxes))))
    labels = torch.stack(all_labels)
    counts = torch.tensor([min(count, max_colours) for count in (6, 3, 0, 5)])
    targets = Targets(torch.stack(all_boxes), labels, torch.arange(7) < counts[:, None])
    draws = torch.rand(len(SIZES), augmentation.num_draws, generator=generator)
    return torch.stack(images), targets, torch.tensor(SIZES), draws


def find_colour(image: Tensor, label: int) -> Tensor:
    return ((image - COLOURS[label][:, None, None]).abs() < 64).all(0)


def extent(mask: Tensor) -> Tensor:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.tensor(
        [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32
    )


@pytest.mark.parametrize("kind", PREPROCESS)
@pytest.mark.parametrize("resize_factor", [1.0, 1.5, 3.0])
@pytest.mark.parametrize(
    "options",
    [
        OFF,
        {"crop": "none", "horizontal_flip": 1.0},
        {"crop": "none", "horizontal_flip": 0.0, "vertical_flip": 1.0},
        {"crop": "none", "zoom_out": 1.0},
        {"vertical_flip": 0.5},
        {"vertical_flip": 0.5, "zoom_out": 0.5},
    ],
    ids=["nothing", "left-right", "upside down", "zoom-out", "crop", "all"],
)
def test_boxes_lie_around_the_pixels(kind: str, resize_factor: float, options: dict[str, Any]):
    augmentation = BatchAugmentation(
        Augmentation(on_device=resize_factor, **options), PREPROCESS[kind]
    )
    num_kept = num_clipped = 0
    for seed in range(8):
        batch = make_batch(augmentation, seed)
        output_size = (None, 80, 128)[seed % 3]
        images, targets = augmentation(*batch, output_size)
        size = output_size or SIZE
        assert images.shape == (4, 3, size, size) and images.dtype == torch.float32
        assert images.min() >= -1e-3 and images.max() <= 255.001
        assert not targets.valid[2].any()
        assert not targets.boxes[~targets.valid].any() and not targets.labels[~targets.valid].any()
        for image, boxes, labels, valid in zip(images, *targets, strict=True):
            for box, label in zip(boxes[valid], labels[valid].tolist(), strict=True):
                # What shrinks to a few pixels is blurred away.
                if (box[2:] - box[:2]).min() < 5:
                    continue
                # A bilinear sample blurs an edge by as much as a pixel is enlarged.
                torch.testing.assert_close(extent(find_colour(image, label)), box, atol=1.6, rtol=0)
                num_kept += 1
                num_clipped += int(((box < 1e-3) | (box > size - 1e-3)).any())
    assert num_kept > 50
    assert (num_clipped > 10) == (options.get("crop") != "none")


@pytest.mark.parametrize("kind", PREPROCESS)
@pytest.mark.parametrize(("zoom_out", "areas"), [(0.0, (0.1, 1.0)), (0.6, (0.5, 1.0))])
def test_windows_and_boxes_follow_the_rule_of_the_crop(
    kind: str, zoom_out: float, areas: tuple[float, float]
):
    """`RandomObjectCoverageCrop`'s rule, one image at a time and in pixels of the image."""
    augmentation = BatchAugmentation(
        Augmentation(zoom_out=zoom_out, horizontal_flip=0.0, crop_areas=areas), PREPROCESS[kind]
    )
    outcomes = {"whole": 0, "dropped": 0, "kept": 0, "without": 0}
    # Each pixel tells where it came from: red is the column, green the row.
    at = torch.arange(SIZE, dtype=torch.uint8) * 2
    columns, rows = at.expand(SIZE, SIZE), at[:, None].expand(SIZE, SIZE)
    origins = torch.stack([columns, rows, torch.zeros_like(rows)])
    for seed in range(12):
        images, targets, sizes, draws = make_batch(augmentation, seed)
        pixels, found = augmentation(origins.expand_as(images), targets, sizes, draws)
        for i, (height, width) in enumerate(SIZES):
            choices = draws[i, :NUM_CHOICES].tolist()
            scale = 1 + 3 * choices[3] if choices[2] < zoom_out else 1.0
            left, top = ((1 - scale) * at * side for at, side in
                         zip(choices[4:6], (width, height), strict=True))  # fmt: skip
            canvas = [left, top, left + scale * width, top + scale * height]
            windows, fit = augmentation.draw_windows(
                torch.tensor([canvas]), sizes[i : i + 1], draws[i : i + 1, NUM_CHOICES:]
            )
            fitted, start = augmentation.loaded.fit(sizes[i : i + 1])
            ratio = torch.tensor([width, height]) / fitted.flip(1)
            boxes = (targets.boxes[i].view(-1, 2, 2) - start.flip(1)) * ratio
            boxes = boxes.view(-1, 4)[targets.valid[i]].tolist()
            threshold = MIN_COVERAGES[int(choices[0] * 7)]
            window, minimum = canvas, 0.0
            if choices[1] >= 0.15:
                for candidate in windows[0][fit[0]].tolist():
                    if any(share(candidate, box) >= threshold - 1e-6 for box in boxes or [canvas]):
                        window, minimum = candidate, threshold
                        break
            outcomes["whole"] += window == canvas
            outcomes["without"] += not boxes and window != canvas
            size = torch.tensor([[window[3] - window[1], window[2] - window[0]]])
            place, corner = augmentation.input.fit(size)
            middle = [(window[n] + window[n + 2]) / 2 for n in (0, 1)]
            if 9 < middle[0] < width - 9 and 9 < middle[1] < height - 9:
                row, column = (corner + place / 2)[0].long().tolist()
                seen = pixels[i, :2, row - 1 : row + 1, column - 1 : column + 1].mean((1, 2)) / 2
                origin = torch.tensor(middle) / ratio[0] + start[0].flip(0) - 0.5
                torch.testing.assert_close(seen, origin, atol=2.1, rtol=0)
            for k, box in enumerate(boxes):
                covered = share(window, box)
                if abs(covered - minimum) < 1e-4:
                    continue
                kept = covered > 0 and covered >= minimum
                assert bool(found.valid[i, k]) == kept, (seed, i, k, covered, minimum)
                outcomes["kept" if kept else "dropped"] += 1
                if kept:
                    expected = [
                        (min(max(box[n], window[n % 2]), window[n % 2 + 2]) - window[n % 2])
                        * place[0, 1 - n % 2].item()
                        / (window[n % 2 + 2] - window[n % 2])
                        + corner[0, 1 - n % 2].item()
                        for n in range(4)
                    ]
                    torch.testing.assert_close(
                        found.boxes[i, k], torch.tensor(expected), atol=1e-2, rtol=0
                    )
    assert min(outcomes.values()) > 3, outcomes


def share(window: list[float], box: list[float]) -> float:
    width = min(window[2], box[2]) - max(window[0], box[0])
    height = min(window[3], box[3]) - max(window[1], box[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def test_windows_stay_in_bounds():
    """As in TensorFlow's crop, but for whole pixels."""
    augmentation = BatchAugmentation(Augmentation(), PREPROCESS["stretch"])
    height, width = 60, 80
    draws = torch.rand(1, 4 * 20_000, generator=torch.Generator().manual_seed(0))
    windows, fit = augmentation.draw_windows(
        torch.tensor([[0.0, 0, width, height]]), torch.tensor([[height, width]]), draws
    )
    windows = windows[fit]
    assert len(windows) > 19_000
    assert windows.min() >= 0 and (windows[:, 2:] <= torch.tensor([width, height]) + 1e-4).all()
    w, h = (windows[:, 2:] - windows[:, :2]).T
    area, ratio = w * h / (width * height), w / h
    assert 0.0999 < area.min() < 0.11 and 0.95 < area.max() < 1.0001
    assert 0.499 < ratio.min() < 0.51 and 1.99 < ratio.max() < 2.001
    assert abs(ratio.mean() - 1.25) < 0.02
    heights = h[(ratio - 1).abs() < 0.02]
    assert abs(heights.mean() - 41) < 1.5


@pytest.mark.parametrize("kind", PREPROCESS)
def test_nothing_happens_to_what_is_not_augmented(kind: str):
    augmentation = BatchAugmentation(Augmentation(**OFF), PREPROCESS[kind])
    images, targets, sizes, draws = make_batch(augmentation)
    same, kept = augmentation(images, targets, sizes, draws)
    torch.testing.assert_close(same, images.float(), atol=0.01, rtol=0)
    torch.testing.assert_close(kept.boxes, targets.boxes, atol=1e-3, rtol=0)
    assert kept.labels.equal(targets.labels) and kept.valid.equal(targets.valid)


@pytest.mark.parametrize("resize_factor", [2.0, 4.0])
def test_shrinking_passes_over_no_pixel(resize_factor: float):
    """Noise shrinks to the means of its cells: every pixel has its share."""
    augmentation = BatchAugmentation(
        Augmentation(on_device=resize_factor, **OFF), PREPROCESS["stretch"]
    )
    generator = torch.Generator().manual_seed(0)
    side = augmentation.loaded.input_size
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    targets = Targets(torch.zeros(2, 1, 4), torch.zeros(2, 1).long(), torch.zeros(2, 1).bool())
    sizes, draws = torch.full((2, 2), 500), torch.rand(2, augmentation.num_draws)
    pixels, _ = augmentation(images, targets, sizes, draws)
    expected = F.avg_pool2d(images.float(), int(resize_factor))
    torch.testing.assert_close(pixels, expected, atol=0.02, rtol=0)


def test_batched_equals_single():
    augmentation = BatchAugmentation(
        Augmentation(on_device=1.5, vertical_flip=0.5, photometric=0.5, zoom_out=0.5),
        PREPROCESS["letterbox"],
    )
    batch = make_batch(augmentation, 3)
    images, targets = augmentation(*batch)
    for i in range(len(images)):
        one = slice(i, i + 1)
        image, target = augmentation(
            *(Targets(*(f[one] for f in x)) if isinstance(x, Targets) else x[one] for x in batch)
        )
        torch.testing.assert_close(image, images[one], atol=1e-3, rtol=0)
        for own, whole in zip(target, targets, strict=True):
            torch.testing.assert_close(own, whole[one])
    again, _ = augmentation(*batch)
    assert again.equal(images)
    assert not augmentation(*batch[:3], batch[3].flip(1))[0].equal(images)


@pytest.mark.parametrize(("name", "place"), [("horizontal_flip", 6), ("vertical_flip", 7)])
def test_a_flip_is_as_often_as_said(name: str, place: int):
    augmentation = BatchAugmentation(Augmentation(**OFF | {name: 0.3}), PREPROCESS["stretch"])
    images, targets, sizes, draws = make_batch(augmentation)
    draws[:, place] = torch.tensor([0.2999, 0.3, 0.0, 0.9])
    flipped, _ = augmentation(images, targets, sizes, draws)
    mirror = images.float().flip(3 if name == "horizontal_flip" else 2)
    expected = torch.where(draws[:, place, None, None, None] < 0.3, mirror, images.float())
    torch.testing.assert_close(flipped, expected, atol=0.01, rtol=0)


def test_colours_are_torchvisions():
    augmentation = BatchAugmentation(
        Augmentation(**OFF | {"photometric": 0.5}), PREPROCESS["stretch"]
    )
    generator = torch.Generator().manual_seed(0)
    # So far from the ends of the scale that nothing is cut off.
    shape = (4, 3, SIZE, SIZE)
    images = torch.randint(110, 140, shape, dtype=torch.uint8, generator=generator)
    _, targets, sizes, draws = make_batch(augmentation)
    draws[:, 8] = torch.tensor([0.1, 0.9, 0.9, 0.1])
    draws[:, 10] = torch.tensor([0.9, 0.1, 0.9, 0.1])
    draws[:, 12] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    distorted, moved = augmentation(images, targets, sizes, draws)
    torch.testing.assert_close(moved.boxes, targets.boxes, atol=1e-3, rtol=0)
    for i, image in enumerate(images.float() / 255):
        brightness, contrast, saturation = (
            least + draws[i, place].item() * (most - least)
            for place, least, most in ((9, 0.875, 1.125), (11, 0.5, 1.5), (13, 0.5, 1.5))
        )
        if i in (0, 3):
            image = T.adjust_brightness(image, brightness)
        if i in (2, 3):
            image = T.adjust_saturation(image, saturation)
        if i in (1, 3):
            image = T.adjust_contrast(image, contrast)
        torch.testing.assert_close(distorted[i], image * 255, atol=0.1, rtol=0)
        assert not distorted[i].isclose(images[i].float(), atol=0.5).all()


def test_colours_stay_on_the_scale():
    augmentation = BatchAugmentation(
        Augmentation(**OFF | {"photometric": 1.0}), PREPROCESS["stretch"]
    )
    images, *rest = make_batch(augmentation)
    distorted, _ = augmentation(images, *rest)
    assert distorted.min() >= 0 and distorted.max() <= 255
    assert (distorted == 0).any()


def test_max_boxes():
    augmentation = BatchAugmentation(Augmentation(max_boxes=2, **OFF), PREPROCESS["stretch"])
    images, targets, *rest = make_batch(augmentation)
    # The first boxes fall out: those after them count.
    targets.boxes[0, 0] = torch.tensor([10.0, 10, 10, 30])
    _, kept = augmentation(images, targets, *rest)
    assert kept.valid.tolist() == [
        [False, True, True, False, False, False, False],
        [True, True, False, False, False, False, False],
        [False] * 7,
        [True, True, False, False, False, False, False],
    ]


def test_a_box_too_thin_for_the_numbers_is_dropped():
    augmentation = BatchAugmentation(
        Augmentation(**OFF | {"horizontal_flip": 1.0}), PREPROCESS["stretch"]
    )
    images, targets, *rest = make_batch(augmentation)
    targets.boxes[0, :2] = torch.tensor([[0.0, 10, 1e-20, 30], [0, 10, 1e-3, 30]])
    _, kept = augmentation(images, targets, *rest)
    assert kept.valid[0, :2].tolist() == [False, True]


def test_a_batch_without_any_box():
    augmentation = BatchAugmentation(Augmentation(zoom_out=0.5), PREPROCESS["letterbox"])
    for seed in range(5):
        images, targets = augmentation(*make_batch(augmentation, seed, max_colours=0))
        assert images.isfinite().all() and not targets.valid.any() and not targets.boxes.any()


@pytest.mark.parametrize("size", [64, 144])
def test_resizing_moves_boxes_with_pixels(size: int):
    augmentation = BatchAugmentation(Augmentation(), PREPROCESS["letterbox"])
    images, targets, *_ = make_batch(augmentation)
    resized, moved = resize_batch(images, targets, size)
    assert resized.shape == (4, 3, size, size) and resized.dtype == torch.float32
    assert moved.labels.equal(targets.labels) and moved.valid.equal(targets.valid)
    for image, boxes, labels, valid in zip(resized, *moved, strict=True):
        for box, label in zip(boxes[valid], labels[valid].tolist(), strict=True):
            torch.testing.assert_close(extent(find_colour(image, label)), box, atol=1.2, rtol=0)
    expected = T.resize(images[0].float(), [size, size], antialias=True)
    torch.testing.assert_close(resized[0], expected, atol=1e-3, rtol=0)


def test_coverage_is_the_share_inside():
    windows = torch.tensor([[[0.0, 0, 10, 10]], [[5.0, 5, 6, 6]]])
    boxes = torch.tensor([[5.0, 5, 15, 15], [2, 2, 4, 4], [3, 3, 3, 9], [-4, 0, -1, 2]])
    expected = [[[0.25, 1, 0, 0]], [[0.01, 0, 0, 0]]]
    torch.testing.assert_close(pairwise_coverage(windows, boxes), torch.tensor(expected))
    assert pairwise_coverage(windows, boxes[:0]).shape == (2, 1, 0)
