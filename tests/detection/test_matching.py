from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from detection.matching import match_anchors
from detection.structures import Targets


def make_boxes(*shape: int, seed: int, side: int = 16) -> Tensor:
    """Boxes on whole pixels: their IoUs are rounded alike where they are equal."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, side - 1, (*shape, 2), generator=generator)
    size = torch.randint(1, side, (*shape, 2), generator=generator)
    return torch.cat([low, (low + size).clamp(max=side)], dim=-1).float()


def make_targets(num_images: int, num_boxes: int, *, seed: int) -> Targets:
    """Images with different numbers of boxes, from none to all."""
    boxes = make_boxes(num_images, num_boxes, seed=seed)
    counts = torch.arange(num_images) * num_boxes // max(num_images - 1, 1)
    valid = torch.arange(num_boxes) < counts[:, None]
    return Targets(boxes * valid[..., None], torch.zeros_like(valid, dtype=torch.int64), valid)


def single(boxes: list, anchors: list, **arguments) -> list[int]:
    targets = Targets(
        torch.tensor(boxes).float().view(1, -1, 4),
        torch.zeros(1, len(boxes), dtype=torch.int64),
        torch.ones(1, len(boxes), dtype=torch.bool),
    )
    return match_anchors(torch.tensor(anchors).float(), targets, **arguments)[0].tolist()


def exact_iou(a: list, b: list) -> Fraction:
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return Fraction(int(width * height), int(sum(areas) - width * height))


def match_plainly(anchors: Tensor, boxes: Tensor, threshold: Fraction) -> list[int]:
    """The API's ArgMaxMatcher, written out: equal thresholds, force_match_for_each_row."""
    iou = [[exact_iou(box, anchor) for anchor in anchors.tolist()] for box in boxes.tolist()]
    match = []
    for anchor in range(len(anchors)):
        column = [row[anchor] for row in iou]
        best = max(column, default=Fraction(-1))
        match.append(column.index(best) if best >= threshold else -1)
    for truth in reversed(range(len(iou))):  # the lowest writes last
        match[iou[truth].index(max(iou[truth]))] = truth
    return match


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [Fraction(1, 2), Fraction(1, 4)])
def test_equals_plain_matcher(seed: int, threshold: Fraction) -> None:
    """Among the cases are ties, shared anchors, padded and empty images."""
    anchors = make_boxes(40, seed=seed)
    targets = make_targets(4, 6, seed=100 + seed)
    match = match_anchors(anchors, targets, threshold=float(threshold))
    for i in range(4):
        boxes = targets.boxes[i, targets.valid[i]]
        assert match[i].tolist() == match_plainly(anchors, boxes, threshold)


def test_batched_equals_single() -> None:
    anchors, targets = make_boxes(40, seed=0), make_targets(5, 7, seed=1)
    match = match_anchors(anchors, targets)
    for i in range(5):
        boxes, labels, valid = (field[i : i + 1, : targets.valid[i].sum()] for field in targets)
        assert match[i].equal(match_anchors(anchors, Targets(boxes, labels, valid))[0])


def test_what_lies_in_the_padding_does_not_matter() -> None:
    anchors, targets = make_boxes(40, seed=0), make_targets(5, 7, seed=1)
    match = match_anchors(anchors, targets)
    # Perfect overlaps, were they valid.
    boxes = torch.where(targets.valid[..., None], targets.boxes, anchors[:7])
    assert match_anchors(anchors, targets._replace(boxes=boxes)).equal(match)


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_no_ground_truth(num_boxes: int) -> None:
    targets = Targets(
        torch.zeros(2, num_boxes, 4),
        torch.zeros(2, num_boxes, dtype=torch.int64),
        torch.zeros(2, num_boxes, dtype=torch.bool),
    )
    match = match_anchors(make_boxes(5, seed=0), targets)
    assert match.dtype == torch.int64
    assert match.tolist() == [[-1] * 5] * 2


@pytest.mark.parametrize(
    ("boxes", "anchors", "expected"),
    [
        pytest.param([[0, 0, 4, 4]], [[0, 0, 4, 4], [0, 0, 4, 2], [9, 9, 12, 12]], [0, 0, -1],
                     id="the threshold itself is enough"),
        pytest.param([[0, 0, 4, 4]], [[0, 0, 4, 4], [0, 0, 4, 1.99], [9, 9, 12, 12]], [0, -1, -1],
                     id="below the threshold is not"),
        pytest.param([[0, 0, 1, 1]], [[5, 5, 9, 9], [0, 0, 9, 9]], [-1, 0],
                     id="every ground truth takes its best anchor"),
        pytest.param([[0, 0, 1, 1]], [[0, 0, 9, 9], [0, 0, 9, 9]], [0, -1],
                     id="only the first of equals"),
        pytest.param([[0, 0, 4, 4], [0, 0, 4, 3]], [[0, 0, 4, 3], [9, 9, 12, 12]], [0, -1],
                     id="of two that share an anchor the lower keeps it"),
        pytest.param([[0, 0, 4, 4], [4, 4, 5, 5]], [[0, 0, 5, 5]], [0],
                     id="of two that share their only anchor the lower keeps it"),
        pytest.param([[0, 0, 1, 1], [0, 0, 4, 4]], [[0, 0, 4, 4]], [0],
                     id="forcing takes an anchor from a better ground truth"),
    ],
)  # fmt: skip
def test_single_cases(boxes: list, anchors: list, expected: list[int]) -> None:
    assert single(boxes, anchors) == expected


def test_threshold() -> None:
    boxes, anchors = [[0, 0, 4, 4]], [[0, 0, 4, 4], [0, 0, 4, 3]]
    assert single(boxes, anchors, threshold=0.75) == [0, 0]
    assert single(boxes, anchors, threshold=0.76) == [0, -1]


def match_ties_plainly(
    anchors: Tensor, boxes: Tensor, threshold: Fraction, background: Fraction
) -> list[int]:
    """torchvision's Matcher with allow_low_quality_matches, written out."""
    iou = [[exact_iou(box, anchor) for anchor in anchors.tolist()] for box in boxes.tolist()]
    best_of_truth = [max(row) for row in iou]
    match = []
    for anchor in range(len(anchors)):
        column = [row[anchor] for row in iou]
        best = max(column, default=Fraction(-1))
        is_best = any(value == most > 0 for value, most in zip(column, best_of_truth, strict=True))
        if best >= threshold or is_best:
            match.append(column.index(best))
        else:
            match.append(-2 if best >= background else -1)
    return match


@pytest.mark.parametrize("seed", range(8))
def test_ties_and_ignored_anchors_equal_a_plain_matcher(seed: int) -> None:
    anchors = make_boxes(40, seed=seed)
    targets = make_targets(4, 6, seed=100 + seed)
    match = match_anchors(anchors, targets, background_threshold=0.25, keep_ties=True)
    for i in range(4):
        boxes = targets.boxes[i, targets.valid[i]]
        expected = match_ties_plainly(anchors, boxes, Fraction(1, 2), Fraction(1, 4))
        assert match[i].tolist() == expected
    assert {-2, -1} < set(match.flatten().tolist())


@pytest.mark.parametrize("seed", range(4))
def test_ignored_anchors_may_still_be_forced(seed: int) -> None:
    """The matches are those of before; only background turns into ignored, where it is near."""
    anchors, targets = make_boxes(40, seed=seed), make_targets(4, 6, seed=seed)
    plain = match_anchors(anchors, targets)
    match = match_anchors(anchors, targets, background_threshold=0.25)
    assert match[plain >= 0].equal(plain[plain >= 0])
    near = match_anchors(anchors, targets, threshold=0.25) >= 0
    assert (match == -2).equal(near & (plain < 0))


def test_keep_ties_keeps_them() -> None:
    """Two anchors that overlap a box alike, below the threshold; a box that touches no anchor."""
    boxes, anchors = [[0, 0, 10, 10], [50, 50, 60, 60]], [[0, 0, 10, 4], [0, 6, 10, 10]]
    assert single(boxes[:1], anchors) == [0, -1]
    assert single(boxes, anchors, keep_ties=True) == [0, 0]
