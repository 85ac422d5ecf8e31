from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condconv import CondConv2d, Router
from detection.models.backbones import MobileNetV1
from detection.models.layers import ConvBlock
from detection.models.retinanet import FeaturePyramid, RetinaNet, RetinaNetHead

Calibrate = Callable[[nn.Module, torch.Tensor], Any]

GRIDS = (16, 8, 4, 2, 1)  # of 128 pixels


def make_retinanet(
    *,
    pyramid: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    backbone_experts: int = 1,
    **options: Any,
) -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet(
        backbone=MobileNetV1(width=0.1, num_experts=backbone_experts, strides=(8, 16, 32)),
        pyramid=partial(FeaturePyramid, **({"channels": 64} | (pyramid or {}))),
        head=partial(RetinaNetHead, **({"num_convs": 2} | (head or {}))),
        **{"num_classes": 3, "input_size": 128} | options,
    )


def count_convolutions(network: nn.Module, name: str) -> tuple[int, int]:
    """Conditional ones and routers in a part of the network."""
    modules = list(network.get_submodule(name).modules())
    return (
        sum(isinstance(module, CondConv2d) for module in modules),
        sum(isinstance(module, Router) for module in modules),
    )


@pytest.mark.parametrize("num_scales", [1, 3])
def test_anchors_and_predictions_agree(num_scales: int) -> None:
    network = make_retinanet(num_anchor_scales=num_scales, anchor_ratios=(0.5, 1.0)).eval()
    images = torch.zeros(2, 3, 128, 128)
    levels = network.extract_levels(images)
    assert [tuple(level.shape) for level in levels] == [(2, 64, n, n) for n in GRIDS]
    predictions = network(images)
    num_anchors = [n * n * num_scales * 2 for n in GRIDS]
    assert predictions.level_sizes == tuple(num_anchors)
    assert predictions.anchors.shape == (sum(num_anchors), 4)
    assert predictions.deltas.shape == (2, sum(num_anchors), 4)
    assert predictions.logits.shape == (2, sum(num_anchors), 3)
    assert predictions.num_background == 0
    sides = (predictions.anchors[:, 2:] - predictions.anchors[:, :2]).prod(1).sqrt()
    for level, own in enumerate(sides.split(num_anchors)):
        assert own.min().item() == pytest.approx(4 * 8 * 2**level)


def test_first_probabilities(calibrate: Calibrate) -> None:
    predictions = calibrate(make_retinanet(), torch.randn(8, 3, 128, 128))(
        torch.randn(2, 3, 128, 128)
    )
    probabilities = predictions.logits.sigmoid()
    assert probabilities.mean().item() == pytest.approx(0.01, rel=0.2)
    assert probabilities.std() > 1e-5


@pytest.mark.parametrize(
    ("backbone_experts", "head_experts"), [(1, 1), (4, 1), (1, 4), (2, 4)]
)  # fmt: skip
@pytest.mark.parametrize("separable", [False, True])
def test_switches(backbone_experts: int, head_experts: int, separable: bool) -> None:
    """Backbone and towers are conditional each on its own; pyramid and predictors never."""
    network = make_retinanet(
        backbone_experts=backbone_experts,
        head={"num_experts": head_experts, "separable": separable},
    )
    assert count_convolutions(network, "backbone") == ((16, 8) if backbone_experts > 1 else (0, 0))
    layers = 2 * (2 if separable else 1)
    for tower in ("head.class_tower", "head.box_tower"):
        assert count_convolutions(network, tower) == ((layers, 2) if head_experts > 1 else (0, 0))
    for part in ("pyramid", "head.class_predictor", "head.box_predictor"):
        assert count_convolutions(network, part) == (0, 0)


@torch.no_grad()
def test_routing_differs_between_images_and_levels(calibrate: Calibrate) -> None:
    network = calibrate(make_retinanet(head={"num_experts": 4}), torch.randn(8, 3, 128, 128))
    routings: dict[nn.Module, list[torch.Tensor]] = {}
    for module in network.modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda module, args, output: routings.setdefault(module, []).append(output)
            )
    network(torch.randn(2, 3, 128, 128))
    assert len(routings) == 4
    for levels in routings.values():
        assert len(levels) == len(GRIDS)
        rows = torch.cat(levels)  # of every level and image
        distances = torch.cdist(rows, rows) + torch.eye(len(rows))
        assert distances.min() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_batched_equals_single(calibrate: Calibrate, norm: str | None) -> None:
    network = calibrate(
        make_retinanet(head={"num_experts": 4, "norm": norm}, backbone_experts=4),
        torch.randn(8, 3, 128, 128),
    )
    images = torch.randn(3, 3, 128, 128)
    batched = network(images)
    for i in range(3):
        single = network(images[i : i + 1])
        torch.testing.assert_close(batched.deltas[i], single.deltas[0], rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(batched.logits[i], single.logits[0], rtol=1e-3, atol=2e-4)
    assert (batched.deltas[0] - batched.deltas[1]).abs().mean() > 1e-3, "images differ"


def test_each_level_has_its_batch_statistics() -> None:
    network = make_retinanet(head={"norm": "batch"})
    network(torch.randn(4, 3, 128, 128))
    for layer in network.head.class_tower:
        assert isinstance(layer, ConvBlock)
        assert len(layer.norms) == len(GRIDS)
        means = torch.stack([norm.running_mean for norm in layer.norms])
        assert torch.cdist(means, means).add(torch.eye(len(GRIDS))).min() > 1e-4


@torch.no_grad()
def test_pyramid_adds_what_lies_above() -> None:
    pyramid = FeaturePyramid([2, 3, 4], channels=5, extra_from="p5")
    maps = [torch.randn(1, c, n, n) for c, n in ((2, 11), (3, 6), (4, 3))]
    p3, p4, p5, p6, p7 = pyramid(maps)

    def conv(block: nn.Module, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        (own,) = block.convs
        return F.conv2d(x, own.weight, own.bias, stride=stride, padding=own.kernel_size[0] // 2)

    m5 = conv(pyramid.laterals[2], maps[2])
    m4 = conv(pyramid.laterals[1], maps[1]) + m5.repeat_interleave(2, 2).repeat_interleave(2, 3)
    rows = torch.arange(11) * 6 // 11
    m3 = conv(pyramid.laterals[0], maps[0]) + m4[:, :, rows][..., rows]
    for level, merged in zip((p3, p4, p5), (m3, m4, m5), strict=True):
        torch.testing.assert_close(
            level, conv(pyramid.outputs[(11, 6, 3).index(level.shape[2])], merged)
        )
    torch.testing.assert_close(p6, conv(pyramid.extras[0], p5, stride=2))
    torch.testing.assert_close(p7, conv(pyramid.extras[1], p6.relu(), stride=2))
    from_c5 = FeaturePyramid([2, 3, 4], channels=5, extra_from="c5")
    x = from_c5(maps)[3]
    torch.testing.assert_close(x, conv(from_c5.extras[0], maps[2], stride=2))


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("num_experts", [1, 8])
def test_layers_keep_the_variance(separable: bool, num_experts: int) -> None:
    torch.manual_seed(0)
    block = ConvBlock(64, 64, 3, separable=separable, activation=False, num_experts=num_experts)
    if block.router is not None:  # weights whose squares sum to 1
        nn.init.zeros_(block.router.linear.weight)
        nn.init.constant_(block.router.linear.bias, -0.6032)
    x = torch.randn(4, 64, 24, 24)
    assert block(x).std().item() == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pyramid": {"extra_from": "c4"}}, "extra_from"),
        ({"head": {"norm": "layer"}}, "norm"),
    ],
)
def test_unknown_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_retinanet(**options)


def test_wrong_input_size() -> None:
    with pytest.raises(ValueError, match="128 x 128"):
        make_retinanet()(torch.zeros(1, 3, 128, 64))


def test_building_leaves_no_trace() -> None:
    network = make_retinanet(pyramid={"norm": "batch"})
    assert network.training
    assert all(b == 0 for n, b in network.named_buffers() if n.endswith("num_batches_tracked"))
    assert not any(p.is_meta for p in network.parameters())
    assert "anchors" not in network.state_dict()
