from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv import CondConv2d, Conv2dSame, RoutedCondConv2d, Router

ARGUMENTS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "stride": 2, "groups": 2, "bias": False},
    {"kernel_size": 3, "groups": 4, "padding": "valid"},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
]


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_equal_experts_with_weights_that_sum_to_one_are_the_convolution(
    arguments: dict[str, Any],
) -> None:
    static = nn.Conv2d(4, 8, **arguments)
    layer = CondConv2d(4, 8, **arguments, num_experts=3)
    with torch.no_grad():
        layer.weight.copy_(static.weight.expand_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(static.bias.expand_as(layer.bias))
    routing_weights = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.5, 0.75, -0.25]])
    torch.testing.assert_close(
        layer(images(), routing_weights), static(images()), rtol=1e-5, atol=1e-6
    )


def test_routed_layer_replaces_a_convolution_inside_a_network() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    shape = network(images()).shape
    network[0] = RoutedCondConv2d(4, 8, 3, padding=1, num_experts=4)
    network[2] = RoutedCondConv2d(8, 2, 1, num_experts=4)
    y = network(images())
    assert y.shape == shape
    y.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_routed_layer_routes_each_example_by_itself() -> None:
    layer = RoutedCondConv2d(4, 8, 3, padding="same", stride=2, num_experts=4)
    x = images()
    y = layer(x)
    torch.testing.assert_close(y, super(RoutedCondConv2d, layer).forward(x, layer.router(x)))
    torch.testing.assert_close(y, torch.cat([layer(example) for example in x.split(1)]))
    given = torch.rand(3, 4)
    torch.testing.assert_close(
        layer(x, given), super(RoutedCondConv2d, layer).forward(x, given), rtol=0, atol=0
    )
    assert not torch.allclose(layer(x, given), y)


def test_experts_start_like_the_convolution_they_replace() -> None:
    layer = CondConv2d(64, 32, 3, groups=2, num_experts=8)
    bound = 1 / math.sqrt(32 * 3 * 3)
    assert layer.bias is not None
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(layer.weight[0], layer.weight[1])


def test_state_dict_names_and_shapes() -> None:
    layer = RoutedCondConv2d(4, 8, (1, 3), groups=2, num_experts=3)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "weight": (3, 8, 2, 1, 3),
        "bias": (3, 8),
        "router.linear.weight": (3, 4),
        "router.linear.bias": (3,),
    }


def test_router_is_the_sigmoid_of_a_linear_layer_on_the_mean() -> None:
    router = Router(4, 3)
    with torch.no_grad():
        router.linear.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    x = images()
    means = torch.stack([example.flatten(1).mean(1) for example in x])
    expected = torch.sigmoid(F.linear(means, router.linear.weight, router.linear.bias))
    torch.testing.assert_close(router(x), expected)


def test_router_starts_glorot_uniform_without_bias() -> None:
    router = Router(500, 100)
    bound = math.sqrt(6 / (500 + 100))
    assert router.linear.weight.abs().max() <= bound
    assert router.linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(router.linear.bias, torch.zeros(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_computes_in_float32_under_autocast(dtype: torch.dtype) -> None:
    router = Router(4, 3)
    expected = router(images())
    with torch.autocast("cpu", dtype):
        routing_weights = router(images())
    assert routing_weights.dtype == torch.float32
    torch.testing.assert_close(routing_weights, expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype):
        half = router(images().to(dtype))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, router(images().to(dtype).float()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
def test_whole_networks_of_other_dtypes(dtype: torch.dtype, groups: int) -> None:
    layer = RoutedCondConv2d(4, 8, 3, groups=groups, num_experts=3)
    expected = layer(images())
    y = layer.to(dtype)(images().to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("groups", [1, 4])
def test_channels_last_networks(groups: int) -> None:
    network = nn.Sequential(RoutedCondConv2d(4, 8, 3, groups=groups, num_experts=3), nn.ReLU())
    expected = network(images())
    names = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parameters = list(network.parameters())
    network.to(memory_format=torch.channels_last)
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert network[0].weight.is_contiguous()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, names[name])
    y = network(images().to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


def test_gradients_follow_a_conversion() -> None:
    layer = RoutedCondConv2d(4, 8, 3, num_experts=3)
    layer(images()).sum().backward()
    assert layer.weight.grad is not None
    grad = layer.weight.grad.clone()
    layer.double()
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.dtype == torch.float64
    torch.testing.assert_close(layer.weight.grad, grad.double())


def test_shared_memory() -> None:
    layer = RoutedCondConv2d(4, 8, 3, num_experts=3).share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())


def test_meta_device() -> None:
    with torch.device("meta"):
        layer = RoutedCondConv2d(4, 8, 3, padding="same", stride=2, num_experts=3)
        y = layer(torch.empty(2, 4, 9, 9))
    assert y.shape == (2, 8, 5, 5) and y.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer.router.reset_parameters()
    assert layer(images()).isfinite().all()


def test_copies_and_pickles() -> None:
    layer = RoutedCondConv2d(4, 8, 3, padding="same", num_experts=3)
    expected = layer(images())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = RoutedCondConv2d(4, 8, 3, padding="same", num_experts=3)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        torch.testing.assert_close(other(images()), expected, rtol=0, atol=0)
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert repr(other) == repr(layer)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(groups: int, num_experts: int, strict: bool) -> None:
    layer = RoutedCondConv2d(
        4, 8, 3, padding="same", stride=2, groups=groups, num_experts=num_experts
    )
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        layer, (images(),), dynamic_shapes={"x": {0: batch}}, strict=strict
    ).module()
    for size in (1, 2, 5):
        torch.testing.assert_close(exported(images(size)), layer(images(size)))


def test_same_convolution_pads_like_tensorflow() -> None:
    layer = Conv2dSame(4, 8, 3, stride=2)
    x = images()  # 9 x 8: one row before and after, one column after
    expected = F.conv2d(F.pad(x, (0, 1, 1, 1)), layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number from 1 on, got 0"),
        ({"num_experts": True}, "num_experts must be a whole number from 1 on, got True"),
        ({"num_experts": 1.5}, r"num_experts must be a whole number from 1 on, got 1\.5"),
        ({"num_experts": 2, "kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"num_experts": 2, "groups": 0}, "groups and stride must be at least 1, got 0 and 1"),
        ({"num_experts": 2, "stride": 0}, "groups and stride must be at least 1, got 1 and 0"),
        ({"num_experts": 2, "groups": 3}, "4 input and 8 output channels cannot be split into 3"),
        ({"num_experts": 2, "padding": "full"}, "padding must be .* got 'full'"),
    ],
)
def test_impossible_layers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CondConv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3} | arguments)


@pytest.mark.parametrize("size", [(4, 9, 8), (2, 5, 9, 8)])
def test_a_router_names_the_shape_that_it_takes(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \(B, 4, H, W\), got \("):
        RoutedCondConv2d(4, 8, 3, num_experts=2)(torch.zeros(size))
