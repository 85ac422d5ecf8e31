from __future__ import annotations

import pytest
import torch
from torch import nn

from condconv import CondConv2d, Router, count_multiply_adds
from condconv.backbones import MobileNetV1
from condconv.backbones.mobilenet_v1 import ConvNormAct, RoutedBlock, scale_channels


@pytest.mark.parametrize("num_experts", [1, 4])
def test_feature_maps(num_experts: int) -> None:
    network = MobileNetV1(width=0.25, num_experts=num_experts)
    assert len(network.blocks) == 13
    assert network.feature_channels == (128, 256)
    for size, strided in ((300, (19, 10)), (224, (14, 7)), (97, (7, 4))):
        stride16, stride32 = network(torch.zeros(2, 3, size, size))
        assert stride16.shape == (2, 128, strided[0], strided[0])
        assert stride32.shape == (2, 256, strided[1], strided[1])


def test_the_static_network_has_no_routing() -> None:
    network = MobileNetV1(width=0.25)
    assert not any(isinstance(module, Router | CondConv2d) for module in network.modules())
    assert all("router" not in name for name in network.state_dict())


def test_blocks_6_to_13_are_conditional_and_share_one_routing() -> None:
    network = MobileNetV1(width=0.25, num_experts=4)
    assert isinstance(network.stem.conv, nn.Conv2d)
    channels = [16, 16, 32, 32, 64, 64, *[128] * 6, 256]
    for number, (block, in_channels) in enumerate(
        zip(network.blocks, channels, strict=True), start=1
    ):
        kinds = [type(layer.conv) is CondConv2d for layer in block.layers.values()]
        routers = [module for module in block.modules() if isinstance(module, Router)]
        assert kinds == [number >= 6] * 2
        assert len(routers) == (number >= 6)
        if routers:
            assert routers[0].linear.in_features == in_channels


def test_one_routing_reaches_every_layer_of_a_block() -> None:
    block = MobileNetV1(width=0.25, num_experts=4).blocks[5].eval()
    seen = []
    for layer in block.layers.values():
        layer.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    x = torch.randn(2, 64, 5, 5)
    block(x)
    assert seen[0][1] is seen[1][1]
    torch.testing.assert_close(seen[0][1], block.router(x))


def test_examples_do_not_depend_on_each_other() -> None:
    network = MobileNetV1(width=0.25, num_experts=4).eval()
    x = torch.randn(3, 3, 64, 64)
    whole = network(x)
    alone = [torch.cat(parts) for parts in zip(*(network(e) for e in x.split(1)), strict=True)]
    torch.testing.assert_close(list(whole), alone, rtol=1e-4, atol=1e-5)


def test_kernels_start_truncated_normal() -> None:
    layer = ConvNormAct(64, 64, 3, num_experts=4)
    weight = layer.conv.weight
    # A normal distribution cut at two standard deviations has 0.88 of its standard deviation.
    assert weight.abs().max() <= 0.06
    assert weight.std().item() == pytest.approx(0.03 * 0.88, rel=0.02)


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1.0, 32), (32, 0.25, 16), (64, 0.75, 48), (30, 0.7, 21)],
)
def test_scale_channels(channels: int, width: float, expected: int) -> None:
    assert scale_channels(channels, width) == expected


@pytest.mark.parametrize(
    ("num_experts", "tolerance", "paper"), [(1, 0.01, 567e6), (8, 0.02, 600e6)]
)
def test_multiply_adds_are_the_papers(num_experts: int, tolerance: float, paper: float) -> None:
    with torch.device("meta"):
        network = MobileNetV1(num_experts=num_experts)
        features = count_multiply_adds(network, torch.empty(1, 3, 224, 224))
    classifier = 1024 * 1000 + (num_experts * 1024 * 1001 if num_experts > 1 else 0)
    assert features + classifier == pytest.approx(paper, rel=tolerance)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_compiles_without_graph_breaks(num_experts: int) -> None:
    layers = {
        "depthwise": ConvNormAct(8, 8, 3, stride=2, groups=8, num_experts=num_experts),
        "pointwise": ConvNormAct(8, 16, 1, num_experts=num_experts),
    }
    block = RoutedBlock(layers, in_channels=8, num_experts=num_experts).eval()
    x = torch.randn(2, 8, 9, 9)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"width": 0.0}, "width must be positive"), ({"num_experts": 0}, "at least 1")],
)
def test_impossible_networks_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNetV1(**arguments)
