from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from detection.boxes import (
    CODE_WEIGHTS,
    box_area,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    pairwise_iou,
)


def make_boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 80
    size = torch.rand(*shape, 2, generator=generator) * 40 + 1
    return torch.cat([corner, corner + size], dim=-1)


def test_box_area() -> None:
    assert box_area(torch.tensor([[1.0, 2.0, 4.0, 8.0], [5.0, 5.0, 5.0, 9.0]])).tolist() == [18, 0]
    assert box_area(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ([0, 0, 4, 4], [0, 0, 4, 4], 1),
        ([0, 0, 4, 4], [0, 0, 4, 2], 1 / 2),
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),
        ([0, 0, 2, 2], [2, 0, 4, 2], 0),  # touching
        ([0, 0, 2, 2], [3, 3, 4, 4], 0),  # apart on both axes
        ([1, 1, 1, 1], [1, 1, 1, 1], 0),  # no area, no union
        ([0, 0, 2, 2], [1, 1, 1, 2], 0),
    ],
)
def test_iou_of_a_pair(a: list, b: list, iou: float) -> None:
    boxes_a, boxes_b = torch.tensor([a]).float(), torch.tensor([b]).float()
    assert pairwise_iou(boxes_a, boxes_b).item() == pytest.approx(iou)


def test_iou_equals_torchvision() -> None:
    a, b = make_boxes(7, seed=1), make_boxes(5, seed=2)
    torch.testing.assert_close(pairwise_iou(a, b), box_iou(a, b))


def test_iou_batched_equals_single() -> None:
    a, b = make_boxes(3, 7, seed=1), make_boxes(5, seed=2)
    batched = pairwise_iou(a, b)
    assert batched.shape == (3, 7, 5)
    for i in range(3):
        assert batched[i].equal(pairwise_iou(a[i], b))


@pytest.mark.parametrize(("num_a", "num_b"), [(0, 3), (3, 0), (0, 0)])
def test_iou_of_nothing(num_a: int, num_b: int) -> None:
    iou = pairwise_iou(torch.zeros(2, num_a, 4), torch.zeros(num_b, 4))
    assert iou.shape == (2, num_a, num_b)


def test_codes_equal_torchvision() -> None:
    boxes, anchors = make_boxes(9, seed=1), make_boxes(9, seed=2)
    coder = BoxCoder(CODE_WEIGHTS)
    codes = encode_boxes(boxes, anchors)
    torch.testing.assert_close(codes, coder.encode_single(boxes, anchors), rtol=1e-5, atol=1e-4)
    deltas = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)) * 5
    torch.testing.assert_close(
        decode_boxes(deltas, anchors), coder.decode_single(deltas, anchors), rtol=1e-5, atol=1e-3
    )


def test_code_by_hand() -> None:
    """Centre moved by a tenth of the anchor's width and a half of its height, size doubled."""
    anchor = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    box = torch.tensor([[-4.0, 0.0, 16.0, 40.0]])
    log2 = math.log(2)
    expected = torch.tensor([[10 * 0.1, 10 * 0.5, 5 * log2, 5 * log2]])
    torch.testing.assert_close(encode_boxes(box, anchor), expected)
    assert encode_boxes(anchor, anchor).eq(0).all()


def test_decode_inverts_encode() -> None:
    boxes, anchors = make_boxes(2, 9, seed=1), make_boxes(9, seed=2)
    torch.testing.assert_close(
        decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=1e-5, atol=1e-4
    )


def test_codes_batched_equal_single() -> None:
    boxes, anchors = make_boxes(3, 9, seed=1), make_boxes(9, seed=2)
    codes = encode_boxes(boxes, anchors)
    decoded = decode_boxes(codes, anchors)
    for i in range(3):
        assert codes[i].equal(encode_boxes(boxes[i], anchors))
        assert decoded[i].equal(decode_boxes(codes[i], anchors))


def test_codes_of_nothing() -> None:
    nothing = torch.zeros(2, 0, 4)
    assert encode_boxes(nothing, nothing[0]).shape == (2, 0, 4)
    assert decode_boxes(nothing, nothing[0]).shape == (2, 0, 4)


def test_decoded_boxes_are_finite() -> None:
    decoded = decode_boxes(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0.0, 300.0, 300.0]]))
    assert decoded.isfinite().all()


def test_clip_boxes() -> None:
    boxes = torch.tensor([[-5.0, -5.0, 30.0, 30.0], [1.0, 2.0, 3.0, 4.0], [25.0, 0.0, 40.0, 5.0]])
    expected = [[0, 0, 20, 10], [1, 2, 3, 4], [20, 0, 20, 5]]
    assert clip_boxes(boxes, width=20, height=10).tolist() == expected
    assert clip_boxes(torch.zeros(2, 0, 4), 20, 10).shape == (2, 0, 4)
