from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detection.augmentation import Augmentation
from detection.data.mixing import MIN_COVERAGE, Mixing, blend, make_mosaic
from detection.data.transforms import FILL, Example, TrainTransform, wrap_boxes

SIDE = 96
# Far from each other, from the background and from the canvas, also after resizing.
COLOURS = torch.tensor(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255],
     [255, 255, 255], [0, 0, 0]]
)  # fmt: skip
BACKGROUND = 128


def make_example(size: tuple[int, int], boxes: list[list[int]], labels: list[int]) -> Example:
    """Rectangles on grey, each in the colour of its label, which are its boxes."""
    image = torch.full((3, *size), BACKGROUND, dtype=torch.uint8)
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        image[:, y1:y2, x1:x2] = COLOURS[label][:, None, None]
    values = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return tv_tensors.Image(image), wrap_boxes(values, size), torch.tensor(labels).long()


def find_colour(image: Tensor, label: int, tolerance: int = 64) -> Tensor:
    """(H, W): where the pixels have the colour of a label."""
    return ((image.int() - COLOURS[label][:, None, None]).abs() < tolerance).all(0)


def extent(mask: Tensor) -> Tensor:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.tensor(
        [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32
    )


def four() -> list[Example]:
    """Wide, high, small and large images, two rectangles each."""
    return [
        make_example((72, 96), [[6, 8, 40, 30], [60, 40, 92, 66]], [0, 1]),
        make_example((120, 60), [[4, 10, 30, 60], [20, 80, 56, 116]], [2, 3]),
        make_example((40, 48), [[3, 3, 14, 18], [24, 20, 46, 38]], [4, 5]),
        make_example((200, 240), [[20, 30, 90, 80], [120, 100, 230, 190]], [6, 7]),
    ]


def test_a_mosaics_boxes_lie_around_the_pixels():
    """A box stays where its share of the pixels does, and is where they are."""
    outcomes = {"whole": 0, "clipped": 0, "dropped": 0}
    for seed in range(60):
        torch.manual_seed(seed)
        image, boxes, labels = make_mosaic(four(), side=SIDE)
        assert image.shape == (3, 2 * SIDE, 2 * SIDE) and image.dtype == torch.uint8
        assert boxes.canvas_size == (2 * SIDE, 2 * SIDE)
        found = dict(zip(labels.tolist(), boxes.as_subclass(Tensor), strict=True))
        for example in four():
            scale = SIDE / max(example[0].shape[-2:])
            for box, label in zip(example[1].as_subclass(Tensor), example[2].tolist(), strict=True):
                mask = find_colour(image, label)
                whole = (box[2:] - box[:2]).prod().item() * scale**2
                share = mask.sum().item() / whole
                if label not in found:
                    assert share < MIN_COVERAGE + 0.1
                    outcomes["dropped"] += 1
                    continue
                assert share > MIN_COVERAGE - 0.05
                torch.testing.assert_close(found[label], extent(mask), atol=1.0, rtol=0)
                outcomes["whole" if share > 0.95 else "clipped"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_little_enough_of_a_box_drops_it():
    """The image of the upper left reaches out to the left by what the point lacks to 96."""
    kept = []
    for seed in range(200):
        torch.manual_seed(seed)
        x, _ = torch.randint(SIDE // 2, SIDE + SIDE // 2 + 1, (2,)).tolist()
        torch.manual_seed(seed)
        examples = [make_example((96, 96), [[0, 60, 50, 90]], [0])] + [
            make_example((96, 96), [], [])
        ] * 3
        _, _, labels = make_mosaic(examples, side=SIDE)
        share = min(50 + min(x - 96, 0), 50) / 50
        assert (len(labels) == 1) == (share >= MIN_COVERAGE), (x, share)
        kept.append(share)
    assert min(kept) < MIN_COVERAGE and any(MIN_COVERAGE < share < 0.2 for share in kept)


def test_a_mosaic_has_the_images_in_their_corners_and_the_fill_beside():
    examples = [make_example((96, 96), [[0, 0, 96, 96]], [label]) for label in range(4)]
    centers = set()
    for seed in range(300):
        torch.manual_seed(seed)
        image, boxes, labels = make_mosaic(examples, side=SIDE)
        assert labels.tolist() == [0, 1, 2, 3]
        (x, y) = boxes[0, 2:].tolist()
        assert boxes[:, [0, 2]].tolist() == [
            [max(x - 96, 0), x], [x, min(x + 96, 192)], [max(x - 96, 0), x], [x, min(x + 96, 192)]
        ]  # fmt: skip
        assert boxes[:, [1, 3]].tolist() == [
            [max(y - 96, 0), y], [max(y - 96, 0), y], [y, min(y + 96, 192)], [y, min(y + 96, 192)]
        ]  # fmt: skip
        covered = torch.stack([find_colour(image, label, 1) for label in range(4)]).any(0)
        beside = image[:, ~covered]
        assert beside.equal(torch.tensor(FILL, dtype=torch.uint8)[:, None].expand_as(beside))
        centers.add((x, y))
    places = torch.tensor(sorted(centers))
    assert places.min() == SIDE // 2 and places.max() == SIDE + SIDE // 2
    assert (places.mean(0) - SIDE).abs().max() < 6


@pytest.mark.parametrize("with_boxes", [0, 1])
def test_a_mosaic_of_images_without_boxes(with_boxes: int):
    empty = make_example((50, 70), [], [])
    examples = [*four()[:with_boxes], *[empty] * (4 - with_boxes)]
    torch.manual_seed(0)
    _, boxes, labels = make_mosaic(examples, side=SIDE)
    assert boxes.shape == (len(labels), 4) and labels.dtype == torch.int64
    assert (len(labels) > 0) == bool(with_boxes)


def test_a_blend_is_the_mean_with_all_boxes():
    first = make_example((60, 80), [[5, 5, 30, 30], [50, 10, 70, 50]], [0, 1])
    second = make_example((60, 80), [[20, 20, 60, 40]], [5])
    image, boxes, labels = blend(first, second)
    assert image.dtype == torch.uint8 and boxes.canvas_size == (60, 80)
    expected = (first[0].double() + second[0].double()).div(2).floor()
    assert image.double().equal(expected.as_subclass(type(image)))
    assert boxes.tolist() == [*first[1].tolist(), *second[1].tolist()]
    assert labels.tolist() == [0, 1, 5]
    # Nothing wraps around.
    white = make_example((8, 8), [[0, 0, 8, 8]], [6])
    assert blend(white, white)[0].unique().tolist() == [255]
    assert blend(first, second, max_boxes=2)[2].tolist() == [0, 1]
    empty = make_example((60, 80), [], [])
    assert blend(empty, empty)[1].shape == (0, 4)
    assert blend(empty, second)[2].tolist() == [5]


def load(seed: int, **options: Any) -> tuple[Example, list[int]]:
    """An item of a set of four, and the places that were read."""
    examples, read = four(), []

    def resize(image: Any, boxes: Any) -> Any:
        return F.resize(image, [SIDE, SIDE], antialias=True), F.resize(boxes, [SIDE, SIDE])

    def read_example(i: int) -> Example:
        read.append(i)
        return examples[i]

    torch.manual_seed(seed)
    transform = TrainTransform(Augmentation(crop="none", horizontal_flip=0.0), resize=resize)
    item = Mixing(side=SIDE, **options).load(2, 4, read_example, transform)
    return item, read


@pytest.mark.parametrize(
    ("options", "num_read"),
    [({}, 1), ({"mosaic": 1}, 4), ({"mixup": 1}, 2), ({"mosaic": 1, "mixup": 1}, 8)],
)
def test_what_is_read(options: dict[str, float], num_read: int):
    partners = set()
    for seed in range(30):
        (image, boxes, labels), read = load(seed, **options)
        assert image.shape == (3, SIDE, SIDE) and len(boxes) == len(labels)
        assert len(read) == num_read and read[0] == 2
        again, _ = load(seed, **options)
        assert image.equal(again[0]) and boxes.equal(again[1]) and labels.equal(again[2])
        partners.update(read[1:])
    assert partners == (set(range(4)) if options else set())


def test_a_probability_is_how_often():
    for option, usual, mixed in (("mosaic", 1, 4), ("mixup", 1, 2)):
        numbers = [len(load(seed, **{option: 0.3})[1]) for seed in range(200)]
        assert {*numbers} == {usual, mixed}
        assert 40 < numbers.count(mixed) < 80


def test_what_is_off_draws_nothing():
    load(0)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert after.equal(torch.get_rng_state())


def test_max_boxes_of_a_blend():
    _, read = load(1, mixup=1.0)
    assert len({*read}) == 2
    for max_boxes, count in ((3, 3), (None, 4)):
        (_, boxes, labels), _ = load(1, mixup=1.0, max_boxes=max_boxes)
        assert len(boxes) == len(labels) == count and labels[:2].tolist() == [4, 5]
