from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from condconv import (
    CondConv2d,
    RoutedCondConv2d,
    Router,
    accelerate_timm,
    convert_to_condconv,
    specialize,
)
from condconv.backbones.mobilenet_v1 import MobileNetV1


def mobilenet(num_experts: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return MobileNetV1(width=0.25, num_experts=num_experts).eval()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


def one_routing_a_block() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(Block(), nn.Conv2d(6, 4, 1)).eval()
    return convert_to_condconv(network, 3, share_within=lambda name, _: name == "0",
                               where=lambda name, _: "0." in name, from_scratch=True)  # fmt: skip


def a_router_each() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        RoutedCondConv2d(3, 4, 3, 2, "same", groups=1, num_experts=3), nn.ReLU(),
        RoutedCondConv2d(4, 8, 3, padding="valid", dilation=(1, 2), groups=2, num_experts=2),
    )  # fmt: skip


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router(3, 3)
        self.depthwise = CondConv2d(3, 3, 3, padding=1, groups=3, num_experts=3)
        self.pointwise = CondConv2d(3, 4, 1, num_experts=3)
        self.own = RoutedCondConv2d(4, 4, 1, num_experts=3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x)
        x = self.pointwise(x=self.depthwise(x, weights), routing_weights=weights)
        return self.own(x, None)


def written_by_hand() -> nn.Module:
    torch.manual_seed(0)
    return HandWritten().eval()


def efficientnet() -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_cc_b0_4e", features_only=True, out_indices=(4,))
    return accelerate_timm(network).eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 33, 32, generator=torch.Generator().manual_seed(batch))


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = network(x)
    return list(y) if isinstance(y, (tuple, list)) else [y]


@pytest.mark.parametrize(
    "make", [mobilenet, one_routing_a_block, a_router_each, written_by_hand, efficientnet]
)
def test_on_the_image_it_was_specialized_to_it_is_the_same(make: Callable[[], nn.Module]) -> None:
    network, x = make(), images(1)
    expected = outputs(network, x)
    # Batches of one image, repeated: their mean is that image's own routing.
    summaries = specialize(network, [x, x.expand(2, -1, -1, -1)])
    assert not any(isinstance(module, (CondConv2d, Router)) for module in network.modules())
    for own, other in zip(outputs(network, x), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert summaries and all(max(own.deviation) < 1e-6 for own in summaries.values())


def test_it_is_the_static_network() -> None:
    network = mobilenet()
    specialize(network, [images(5)])
    static = mobilenet(num_experts=1)
    static.load_state_dict(network.state_dict())
    for own, other in zip(outputs(network, images(2)), outputs(static, images(2)), strict=True):
        assert torch.equal(own, other)


def test_routing_is_the_mean_over_all_samples() -> None:
    layer = RoutedCondConv2d(3, 4, 1, num_experts=2)
    network = nn.Sequential(layer)
    with torch.no_grad():
        weights = layer.router(torch.cat([images(2), images(3)]))
        expected = torch.einsum("e,eoihw->oihw", weights.mean(0), layer.weight)
    summaries = specialize(network, iter([images(2), images(3)]))
    torch.testing.assert_close(network[0].weight, expected)
    assert summaries["0.router"].deviation == pytest.approx(weights.std(0, correction=0).tolist())


def test_a_layer_that_runs_several_times_gets_the_mean_of_all() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = RoutedCondConv2d(3, 4, 1, num_experts=2)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.layer(x), self.layer(3 * x[:, :, ::2])]

    network = Levels()
    layer, x = network.layer, images(2)
    with torch.no_grad():
        weights = torch.cat([layer.router(x), layer.router(3 * x[:, :, ::2])])
        expected = torch.einsum("e,eoihw->oihw", weights.mean(0), layer.weight)
    specialize(network, [x])
    torch.testing.assert_close(network.layer.weight, expected)


def test_under_autocast_parameters_keep_their_precision() -> None:
    network, x = nn.Sequential(RoutedCondConv2d(3, 4, 1, num_experts=2)), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        specialize(network, [x])
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert network(x).dtype == torch.float32


def test_mistakes_change_nothing() -> None:
    for network in (nn.Sequential(nn.Conv2d(3, 4, 1)), RoutedCondConv2d(3, 4, 1, num_experts=2)):
        with pytest.raises(ValueError, match="no CondConv layer below"):
            specialize(network, [images(1)])
    network = nn.Sequential(RoutedCondConv2d(3, 4, 1, num_experts=2)).train()
    with pytest.raises(ValueError, match="no router ran"):
        specialize(network, [])
    network[0].register_module("unused", RoutedCondConv2d(3, 4, 1, num_experts=2))
    with pytest.raises(ValueError, match=r"0\.unused did not run"):
        specialize(network, [images(1)])
    assert isinstance(network[0], RoutedCondConv2d) and network[0].training
