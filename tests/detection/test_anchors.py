from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detection.anchors import grid_anchors, retinanet_anchor_sizes, ssd_anchor_sizes

SCALES = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]


def test_sizes_of_the_first_level() -> None:
    root = math.sqrt(2)
    expected = [(0.1, 0.1), (0.2 * root, 0.2 / root), (0.2 / root, 0.2 * root)]
    for size, expected_size in zip(ssd_anchor_sizes(6)[0], expected, strict=True):
        assert size == pytest.approx(expected_size)


@pytest.mark.parametrize("level", range(1, 6))
def test_sizes_of_the_other_levels(level: int) -> None:
    sizes = ssd_anchor_sizes(6)[level]
    scale, next_scale = SCALES[level : level + 2]
    for (width, height), ratio in zip(sizes[:5], [1, 2, 1 / 2, 3, 1 / 3], strict=True):
        assert width * height == pytest.approx(scale**2)
        assert width / height == pytest.approx(ratio, rel=1e-3)
    assert sizes[5] == pytest.approx([math.sqrt(scale * next_scale)] * 2)


def test_full_first_level() -> None:
    sizes = ssd_anchor_sizes(6, reduce_boxes_in_lowest_layer=False)
    assert [len(level) for level in sizes] == [6] * 6
    assert sizes[0][0] == pytest.approx((0.2, 0.2))


def test_other_scales() -> None:
    sizes = ssd_anchor_sizes(3, min_scale=0.1, max_scale=0.9)
    assert sizes[1][0] == pytest.approx((0.5, 0.5))
    assert sizes[2][0] == pytest.approx((0.9, 0.9))


def test_single_level() -> None:
    (sizes,) = ssd_anchor_sizes(1, reduce_boxes_in_lowest_layer=False)
    assert sizes[0] == pytest.approx((0.2, 0.2))
    assert sizes[5] == pytest.approx([math.sqrt(0.2)] * 2)


def test_order_is_level_row_column_anchor() -> None:
    sizes = [[(0.2, 0.4), (0.1, 0.1)], [(1.0, 0.5)]]
    anchors = grid_anchors(sizes, [(1, 2), (2, 1)], input_size=100)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    expected_centers = [[25, 50], [25, 50], [75, 50], [75, 50], [50, 25], [50, 75]]
    expected_sizes = [[20, 40], [10, 10], [20, 40], [10, 10], [100, 50], [100, 50]]
    torch.testing.assert_close(centers, torch.tensor(expected_centers).float())
    torch.testing.assert_close(
        anchors[:, 2:] - anchors[:, :2], torch.tensor(expected_sizes).float()
    )


def test_ssd300_has_1917_anchors() -> None:
    grids = [(n, n) for n in (19, 10, 5, 3, 2, 1)]
    anchors = grid_anchors(ssd_anchor_sizes(6), grids, 300)
    assert anchors.shape == (1917, 4) and anchors.dtype == torch.float32
    assert (anchors[:, 2:] > anchors[:, :2]).all()
    assert anchors.min() < 0 and anchors.max() > 300, "anchors are not clipped"


def test_level_counts_must_agree() -> None:
    with pytest.raises(ValueError, match="argument"):
        grid_anchors([[(1.0, 1.0)]], [(1, 1), (2, 2)], 100)


def test_retinanet_sizes() -> None:
    sizes = retinanet_anchor_sizes([8, 128], input_size=256)
    for stride, level in zip([8, 128], sizes, strict=True):
        assert len(level) == 9
        for place, (width, height) in enumerate(level):
            ratio, octave = (0.5, 1.0, 2.0)[place // 3], place % 3 / 3
            assert height / width == pytest.approx(ratio)
            assert math.sqrt(width * height) * 256 == pytest.approx(4 * stride * 2**octave)


@pytest.mark.parametrize("input_size", [128, 200, 320, 333, 800])
def test_anchors_equal_torchvisions(input_size: int) -> None:
    """At input sizes that strides do not divide too."""
    strides = [8, 16, 32, 64, 128]
    grids = [(-(-input_size // stride),) * 2 for stride in strides]
    octaves = [tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in strides]
    generator = AnchorGenerator(tuple(octaves), ((0.5, 1.0, 2.0),) * 5)
    images = ImageList(torch.zeros(1, 3, input_size, input_size), [(input_size, input_size)])
    (expected,) = generator(images, [torch.zeros(1, 1, *grid) for grid in grids])
    sizes = retinanet_anchor_sizes(strides, input_size=input_size, whole_pixels=True)
    assert grid_anchors(sizes, grids, input_size, centered=False).equal(expected)
