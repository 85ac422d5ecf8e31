from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from condconv import (
    CondConv2d,
    Conv2dSame,
    RoutedCondConv2d,
    Router,
    accelerate_timm,
    convert_to_condconv,
    spread_over_experts,
)
from condconv.backbones import MobileNetV1
from condconv.backbones.mobilenet_v1 import RoutedBlock
from condconv.shared_routing import SharedRouting


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is not installed")


def images(batch: int = 3, channels: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, size, size, generator=generator)


def of(*classes: type[nn.Module]) -> Callable[[str, nn.Module], bool]:
    return lambda _, module: isinstance(module, classes)


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        InvertedResidual(8, 8, stride=1, expand_ratio=2),
        BasicBlock(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def converted_network(**options: Any) -> nn.Sequential:
    """Of all kinds of layers, and routed differently for each example."""
    network = small_network()
    share = of(InvertedResidual, BasicBlock)
    convert_to_condconv(network, 4, share_within=share, **options)
    for router in network.modules():
        if isinstance(router, Router):
            nn.init.normal_(router.linear.weight)
    return network


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """In evaluation mode, and in float64 in training mode too (batch norm amplifies roundings).

    Scaled to 1: those of networks that are not trained can be next to nothing.
    """
    network = copy.deepcopy(network)
    found = []
    for mode in (False, True) if x.dtype == torch.float64 else (False,):
        torch.manual_seed(0)  # of dropout
        y = network.train(mode)(x)
        found += [y / y.abs().max() for y in (y if isinstance(y, tuple) else (y,))]
    return found


@pytest.mark.parametrize("num_experts", [2, 3, 8])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(6, 4, 3, padding=1),
        lambda: nn.Conv2d(6, 4, (1, 3), (1, 2), (0, 1), (1, 2), bias=False),
        lambda: nn.Conv2d(6, 6, 3, groups=6, stride=2),
        lambda: nn.Conv2d(6, 4, 3, groups=2, padding="same", dilation=2),
        lambda: nn.Conv2d(6, 4, (2, 4), padding="same"),
        lambda: nn.Conv2d(6, 4, 3, padding="valid"),
        lambda: nn.Conv2d(6, 4, 3, padding=[1, 0]),  # a list, as timm gives
        lambda: Conv2dSame(6, 4, 3, stride=2),
    ],
)
def test_a_convolution_keeps_its_function(make: Callable[[], nn.Conv2d], num_experts: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        static, x = make().to(dtype), images(2, 6, 9).to(dtype)
        layer = convert_to_condconv(static, num_experts)
        assert isinstance(layer, RoutedCondConv2d) and layer.num_experts == num_experts
        torch.testing.assert_close(layer(x), static(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_timms_same_padding(timm: Any, stride: int, size: int) -> None:
    static = timm.layers.create_conv2d(6, 4, (3, 2), stride=stride, padding="same").double()
    assert type(static).__name__ == "Conv2dSame"
    x = images(2, 6, size).double()
    layer = convert_to_condconv(static, 4)
    torch.testing.assert_close(layer(x), static(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shared", "dtype", "tolerance"),
    [
        *((name, shared, torch.float64, 1e-11)
          for name in ("resnet18", "mobilenet_v2", "timm", "ours") for shared in (False, True)),
        ("ours", True, torch.float32, 1e-5),
    ],
)  # fmt: skip
def test_networks_keep_their_function(
    request: Any, name: str, shared: bool, dtype: torch.dtype, tolerance: float
) -> None:
    if name == "timm":
        timm = request.getfixturevalue("timm")
        network = timm.create_model("tf_mobilenetv3_small_minimal_100")
        parts = timm.models._efficientnet_blocks
        blocks = (parts.DepthwiseSeparableConv, parts.InvertedResidual)
    else:
        network, *blocks = {
            "resnet18": (torchvision.models.resnet18(weights=None), BasicBlock),
            "mobilenet_v2": (torchvision.models.mobilenet_v2(weights=None), InvertedResidual),
            "ours": (MobileNetV1(width=0.25), RoutedBlock),
        }[name]
    network, x = network.to(dtype), images(4, size=64).to(dtype)
    static = outputs(network, x)
    num_convolutions = sum(isinstance(child, nn.Conv2d) for child in network.modules())
    share = of(*blocks) if shared else None
    assert convert_to_condconv(network, 3, share_within=share) is network
    torch.testing.assert_close(outputs(network, x), static, rtol=tolerance, atol=tolerance)

    layers = [child for child in network.modules() if isinstance(child, CondConv2d)]
    assert len(layers) == num_convolutions
    layers = [layer for layer in layers if not isinstance(layer, RoutedCondConv2d)]
    assert len(layers) >= num_convolutions / 2 if shared else not layers


def make_blocks() -> list[nn.Module]:
    """Of 8 input channels."""
    parts = pytest.importorskip("timm").models._efficientnet_blocks
    resnet = pytest.importorskip("timm").models.resnet
    squeeze = pytest.importorskip("timm").layers.SqueezeExcite

    def downsample() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))

    return [
        BasicBlock(8, 8),
        BasicBlock(8, 16, stride=2, downsample=downsample()),
        Bottleneck(8, 2),
        Bottleneck(8, 4, stride=2, downsample=downsample()),
        InvertedResidual(8, 8, stride=1, expand_ratio=3),
        InvertedResidual(8, 16, stride=2, expand_ratio=1),
        parts.InvertedResidual(8, 8, se_layer=squeeze, drop_path_rate=0.5),
        parts.InvertedResidual(8, 16, stride=2, pad_type="same"),
        parts.DepthwiseSeparableConv(8, 8, se_layer=squeeze),
        resnet.BasicBlock(8, 8, attn_layer="eca"),
        resnet.BasicBlock(8, 16, stride=2, downsample=downsample()),
        resnet.Bottleneck(8, 2, cardinality=2, base_width=64),
        resnet.Bottleneck(8, 4, stride=2, downsample=downsample()),
    ]


@pytest.mark.parametrize("index", range(13))
def test_blocks_share_a_routing(timm: Any, index: int) -> None:
    static = make_blocks()[index].double()
    block, x = copy.deepcopy(static), images(3, 8).double()
    names = [name for name, child in static.named_modules() if isinstance(child, nn.Conv2d)]
    expected = outputs(static, x)
    assert convert_to_condconv(block, 4, share_within=of(type(static))) is block
    torch.testing.assert_close(outputs(block, x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(block, type(static)) and isinstance(block, SharedRouting)
    assert list(block.state_dict()) == [
        *static.state_dict(),
        "router.linear.weight",
        "router.linear.bias",
    ]

    # Each example passes through the static block of its own mixture.
    nn.init.normal_(block.router.linear.weight)
    routing_weights = block.router(x)
    y = block.eval()(x)
    for example, weights, ours in zip(x.split(1), routing_weights, y, strict=True):
        for name in names:
            layer, mixed = block.get_submodule(name), static.get_submodule(name)
            mixed.weight = nn.Parameter(torch.einsum("e,e...->...", weights, layer.weight))
            if mixed.bias is not None:
                mixed.bias = nn.Parameter(weights @ layer.bias)
        torch.testing.assert_close(static.eval()(example)[0], ours, rtol=1e-10, atol=1e-10)
    assert (routing_weights[0] - routing_weights[1]).abs().max() > 0.01


class Peculiar(nn.Module):
    """Depends on the mode, changes its input in place, and takes an option."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 2.0))
        self.unused = nn.Linear(1, 1)
        self.register_buffer("shift", torch.ones(1), persistent=False)
        self.width = 8

    def forward(self, x: Tensor, negate: bool = False) -> Tensor:
        y = self.conv(self.conv(self.activation(x)))  # the same layer twice
        y = F.dropout(y, 0.5, self.training) * self.scale + self.shift
        return -y if negate else y


def test_a_trace_keeps_what_a_block_has() -> None:
    static = Peculiar().double()
    calls = []
    static.register_forward_hook(lambda *_: calls.append("block"))
    block, x = copy.deepcopy(static), images(3, 8).double()
    expected = outputs(static, x.clone())
    convert_to_condconv(block, 2, share_within=lambda name, _: name == "")
    torch.testing.assert_close(outputs(block, x.clone()), expected)
    assert (expected[0] - expected[1]).abs().max() > 0.1, "the mode matters"
    assert len(calls) == 4
    assert isinstance(block, Peculiar) and block.width == 8
    assert [name for name, _ in block.named_parameters()] == [
        *(name for name, _ in static.named_parameters()),
        "router.linear.weight",
        "router.linear.bias",
    ]

    seen = []
    block.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    block(x.clone())
    assert len(seen) == 1 and seen[0].equal(x), "routed before the input changes"


def test_other_shared_routings_stay() -> None:
    """A static block of ours becomes the conditional one, parameter for parameter."""
    network = MobileNetV1(width=0.25)
    blocks = set(network.blocks[5:])
    convert_to_condconv(
        network,
        8,
        where=lambda name, _: name.startswith("blocks.") and int(name.split(".")[1]) >= 5,
        share_within=lambda _, module: module in blocks,
    )
    conditional = MobileNetV1(width=0.25, num_experts=8)
    conditional.load_state_dict(network.state_dict())
    x = images(2, size=64)
    again = copy.deepcopy(network)  # traced again, when the block's own code routes
    torch.testing.assert_close(outputs(again, x), outputs(conditional, x))
    calls = []
    again.blocks[7].router.register_forward_hook(lambda *_: calls.append("router"))
    again(x)
    assert len(calls) == 1


def test_what_is_picked_is_converted_and_nothing_else() -> None:
    network = small_network()
    before = dict(network.named_parameters())
    asked = []

    def where(name: str, module: nn.Conv2d) -> bool:
        asked.append((name, module))
        return name.startswith("2.")

    convert_to_condconv(network, 4, where=where, share_within=of(InvertedResidual, BasicBlock))
    assert [name for name, _ in asked] == [
        "0",
        "1.conv.0.0",
        "1.conv.1.0",
        "1.conv.2",
        "2.conv1",
        "2.conv2",
    ]
    assert all(isinstance(module, nn.Conv2d) for _, module in asked)
    assert isinstance(network[2], SharedRouting) and not isinstance(network[1], SharedRouting)
    for name, parameter in network.named_parameters():
        assert (parameter is before.get(name)) == (not name.startswith(("2.conv", "2.router")))


def test_one_expert_changes_nothing() -> None:
    network = small_network()
    before = repr(network)
    assert convert_to_condconv(network, 1, share_within=of(BasicBlock)) is network
    assert repr(network) == before


def test_a_module_in_several_places_stays_one() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    network = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"again": shared})["again"])
    x = images(2, 4)
    expected = network(x)
    convert_to_condconv(network, 2)
    assert network[0] is network[2] and isinstance(network[0], RoutedCondConv2d)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_new_parameters_are_like_the_old(from_scratch: bool) -> None:
    network = small_network().to(torch.bfloat16)
    network[0].weight.requires_grad_(False)
    network[1].requires_grad_(False)
    network[2].conv1.requires_grad_(False)
    for module in (network[0], network[1].conv[0]):
        module.eval()
    convert_to_condconv(
        network, 4, share_within=of(InvertedResidual, BasicBlock), from_scratch=from_scratch
    )
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    trainable = {name for name, item in network.named_parameters() if item.requires_grad}
    assert {name for name in trainable if name.startswith(("0", "1"))} == {"0.bias"}
    assert {name for name in trainable if "conv" in name or "router" in name} == {
        "2.conv2.weight",
        "2.router.linear.weight",
        "2.router.linear.bias",
    }
    assert not network[0].training and not network[1].conv[0].training
    assert network[1].training and network[2].conv1.training

    with torch.device("meta"):
        network = small_network()
    convert_to_condconv(network, 4, share_within=of(BasicBlock), from_scratch=from_scratch)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network(images().to("meta")).shape == (3, 4)


def test_the_generator_decides_the_experts() -> None:
    kernels = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3)
        torch.rand(len(kernels))  # the default generator does not matter
        generator = torch.Generator().manual_seed(seed)
        kernels.append(convert_to_condconv(layer, 4, generator=generator).weight)
    assert kernels[0].equal(kernels[1]) and not kernels[0].equal(kernels[2])


def test_half_precision_is_rounded_once() -> None:
    static = nn.Conv2d(3, 4, 3).bfloat16()
    experts = [
        convert_to_condconv(layer, 4, generator=torch.Generator().manual_seed(0)).weight
        for layer in (copy.deepcopy(static), copy.deepcopy(static).float())
    ]
    assert experts[0].equal(experts[1].bfloat16())


def test_experts_and_routing() -> None:
    static = nn.Conv2d(6, 4, 3)
    static.weight.data[0] = 0  # a dead channel stays dead
    layer = RoutedCondConv2d(6, 4, 3, num_experts=8)
    layer.load_state_dict(spread_over_experts(static.state_dict(), layer, delta=0.3))
    x = images(2, 6, 8)
    torch.testing.assert_close(layer.router(x), torch.full((2, 8), 1 / math.sqrt(8)))
    torch.testing.assert_close(layer(x), static(x), rtol=1e-4, atol=1e-5)
    for experts, kernel in ((layer.weight, static.weight), (layer.bias, static.bias)):
        base = kernel.detach() / math.sqrt(8)
        deltas = experts.detach() - base
        assert deltas.sum(0).abs().max() < 1e-6
    deltas = layer.weight.detach() - static.weight.detach() / math.sqrt(8)
    assert not deltas[:, 0].any()
    size = deltas[:, 1:].square().mean((0, 2, 3, 4)).sqrt()
    base = static.weight[1:].detach().square().mean((1, 2, 3)).sqrt() / math.sqrt(8)
    torch.testing.assert_close(size / base, torch.full((3,), 0.3), rtol=0.1, atol=0)


def test_static_network_takes_the_state_as_it_is() -> None:
    state = MobileNetV1(width=0.1).state_dict()
    assert spread_over_experts(state, MobileNetV1(width=0.1)) == state


def test_from_scratch_keeps_the_networks_own_initialization() -> None:
    static = nn.Conv2d(8, 16, 3)
    nn.init.trunc_normal_(static.weight, std=0.1, a=-0.05, b=0.2)
    layer = convert_to_condconv(copy.deepcopy(static), 4, from_scratch=True)
    expected = static.weight.flatten().sort().values
    for expert in layer.weight:
        assert expert.flatten().sort().values.equal(expected)
    experts = layer.weight.detach().flatten(1)
    assert (torch.corrcoef(experts) - torch.eye(4)).abs().max() < 0.15, "independent"
    assert torch.corrcoef(torch.stack([static.weight.flatten(), experts[0]]))[0, 1].abs() < 0.15
    assert layer.router.linear.weight.any() and not layer.router.linear.bias.any()


def test_all_experts_get_the_same_gradient_and_routers_do_not() -> None:
    network = small_network().double()
    convert_to_condconv(network, 4, share_within=of(InvertedResidual, BasicBlock))
    network(images(4).double()).square().sum().backward()
    for module in network.modules():
        if isinstance(module, CondConv2d):
            for parameter in module.parameters(recurse=False):
                assert parameter.grad.abs().max() > 0
                torch.testing.assert_close(parameter.grad, parameter.grad[:1].expand_as(parameter))
        if isinstance(module, Router):
            rows = module.linear.weight.grad
            assert torch.pdist(rows).min() > 1e-3 * rows.norm(dim=1).max() > 0


def test_a_plain_sequence_shares_a_routing() -> None:
    block = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1))
    network, x = nn.Sequential(block, nn.Conv2d(5, 2, 1)), images(2)
    before = network(x)
    convert_to_condconv(
        network, 4, where=lambda name, _: name != "1", share_within=lambda name, _: name == "0"
    )
    torch.testing.assert_close(network(x), before)
    assert sum(isinstance(module, Router) for module in network.modules()) == 1
    with torch.no_grad():
        block.router.linear.weight.normal_()
    assert not torch.allclose(network(x), before)
    torch.testing.assert_close(copy.deepcopy(network)(x), network(x))
    network(x).sum().backward()
    assert block.router.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("delta", [0.1, 0.5])
def test_experts_and_routing_drift_apart(delta: float) -> None:
    network = small_network()
    convert_to_condconv(network, 4, share_within=of(InvertedResidual, BasicBlock), delta=delta)
    layers = [module for module in network.modules() if isinstance(module, CondConv2d)]
    routers = [module for module in network.modules() if isinstance(module, Router)]
    start = [layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    x, labels = images(32) + torch.randn(32, 3, 1, 1), torch.arange(32) % 4
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()
    for layer, before in zip(layers, start, strict=True):
        moved = layer.weight.detach() - before
        assert (moved - moved.mean(0)).norm() / moved.norm() > 1e-3
    routing: list[Tensor] = []
    for router in routers:
        router.register_forward_hook(lambda *arguments: routing.append(arguments[2]))
    network(x)
    assert len(routing) == 3
    for routing_weights in routing:
        assert routing_weights.std(0).max() > 1e-2, "between examples"
        assert routing_weights.std(1).max() > 1e-3, "between experts"


def test_the_mixture_learns_as_fast_as_the_static_kernel() -> None:
    static, x = nn.Conv2d(6, 4, 3).double(), images(4, 6).double()
    layer = convert_to_condconv(copy.deepcopy(static), 8)
    for network, learning in ((static, static), (layer, layer)):
        network(x).square().sum().backward()
        parameters = [learning.weight, learning.bias]
        torch.optim.SGD(parameters, lr=0.01).step()
    for name in ("weight", "bias"):
        mixed = getattr(layer, name).sum(0) / math.sqrt(8)
        torch.testing.assert_close(mixed, getattr(static, name))


class Overridden(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OverriddenInside(nn.Conv2d):
    def _conv_forward(self, *arguments: Any) -> Tensor:
        return super()._conv_forward(*arguments) + 1


class Renamed(nn.Conv2d):
    """As good as its parent."""


def hooked() -> nn.Conv2d:
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def patched() -> nn.Conv2d:
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda input: input
    return layer


def tied() -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    network[1].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            "'0.0' pads with 'reflect'",
        ),
        (lambda: Overridden(3, 4, 3), "Overridden '0.0' has a forward of its own"),
        (lambda: OverriddenInside(3, 4, 3), "OverriddenInside '0.0' has a forward of its own"),
        (lambda: weight_norm(nn.Conv2d(3, 4, 3)), "'0.0' computes its weight"),
        (lambda: nn.LazyConv2d(4, 3), "'0.0' computes its weight, or has none yet"),
        (hooked, "'0.0' has hooks"),
        (patched, "'0.0' has a forward of its own"),
        (tied, r"'0.0.1' has its weight from '0.0.0'"),
        (nn.Flatten, "no nn.Conv2d"),
    ],
)
def test_layers_that_cannot_be_converted(make: Callable[[], nn.Module], message: str) -> None:
    network = nn.Sequential(nn.Sequential(make()))
    before = repr(network)
    with pytest.raises(ValueError, match=message):
        convert_to_condconv(network, 4)
    assert repr(network) == before
    network.append(Renamed(3, 4, 3))
    convert_to_condconv(network, 4, where=lambda name, _: name == "1")
    assert isinstance(network[1], RoutedCondConv2d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number from 1 on, got 0"),
        ({"num_experts": "8"}, "num_experts must be a whole number from 1 on, got '8'"),
        ({"delta": 0.0}, "delta must be within 0.1 and 0.5, got 0.0"),
        ({"delta": 1.0}, "delta must be"),
        ({"delta": math.nan}, "delta must be"),
        ({"where": lambda *_: False}, "`where` picks"),
        ({"share_within": lambda *_: False}, "`share_within` picks no module"),
        ({"share_within": lambda name, _: name in ("1", "1.conv")}, "lies in '1' and in '1.conv'"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    network = small_network()
    before = repr(network)
    with pytest.raises(ValueError, match=message):
        convert_to_condconv(network, **{"num_experts": 4, **options})
    assert repr(network) == before


class Untraceable(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.first = nn.PixelUnshuffle(2)
        self.kind = kind

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        if self.kind == "branch" and x.mean() > 0:
            return x
        if self.kind == "halves":
            return self.inner(x.chunk(2, 1)[0])
        if self.kind == "weight":
            return F.conv2d(x, self.inner[0].weight)
        if self.kind == "depth" and self.training and torch.rand(1).item() < 0.5:
            return x
        if self.kind == "precision":
            with torch.autocast("cpu", enabled=not torch.is_autocast_enabled("cpu")):
                return self.inner(x.float())
        if self.kind == "unshuffle":
            return self.inner(self.first(x))
        return self.inner(x)


class Needy(Untraceable):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x) * mask


def routed_already() -> nn.Module:
    block = Untraceable("")
    block.router = nn.Identity()
    return block


def patched_block() -> nn.Module:
    block = Untraceable("")
    block.forward = lambda x: 2 * block.inner(x)
    return block


def hooked_inside() -> nn.Module:
    block = Untraceable("")
    block.inner.register_forward_hook(lambda *_: None)
    return block


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Untraceable("branch"), "Untraceable '0' .*symbolically traced variables"),
        (lambda: Untraceable("halves"), "takes its whole input"),
        (lambda: Untraceable("weight"), r"does not call inner\.0"),
        (lambda: Needy(""), "Needy '0' cannot share a routing: .*mask"),
        (routed_already, "has a router already"),
        (hooked_inside, "inner has hooks"),
        (patched_block, "its forward is not that of its class"),
        (lambda: Untraceable("depth"), "its forward draws random numbers"),
        (lambda: Untraceable("precision"), "its forward sets autocast or gradients"),
        (lambda: Untraceable("unshuffle"), "takes its whole input"),
    ],
)
def test_blocks_that_cannot_share_are_named(make: Callable[[], nn.Module], reason: str) -> None:
    network = nn.Sequential(make())
    before = repr(network)
    with pytest.raises(ValueError, match=reason):
        convert_to_condconv(network, 4, share_within=of(Untraceable))
    assert repr(network) == before and type(network[0]) in (Untraceable, Needy)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@pytest.mark.parametrize(
    "first",
    [
        nn.GroupNorm(2, 4),
        LayerNorm2d(4),
        FrozenBatchNorm2d(4),
        nn.Upsample(scale_factor=2),
        Swish(),
    ],
)
def test_a_block_may_start_with_what_keeps_its_channels(first: nn.Module) -> None:
    network = nn.Sequential(nn.Sequential(first, nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1)))
    x = torch.randn(2, 4, 5, 5)
    expected = network(x)
    convert_to_condconv(network, 3, share_within=lambda name, _: name == "0")
    torch.testing.assert_close(network(x), expected)


def test_a_block_takes_its_input_alone() -> None:
    network = nn.Sequential(Untraceable(""))
    convert_to_condconv(network, 4, share_within=of(Untraceable))
    x = torch.randn(2, 4, 3, 3)
    for call in (lambda: network[0](x, x), lambda: network[0](x=x)):
        with pytest.raises(TypeError, match="Untraceable shares a routing and so takes its input"):
            call()


def test_experts_of_a_kernel_of_zeros_differ() -> None:
    convolution = nn.Conv2d(4, 6, 3, bias=False)
    nn.init.zeros_(convolution.weight)
    layer = convert_to_condconv(convolution, 4, delta=0.2)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), convolution(x), rtol=0, atol=1e-6)
    expected = torch.tensor(0.2 / math.sqrt(4 * 36))
    torch.testing.assert_close(layer.weight.std(), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training: bool) -> None:
    network, x = converted_network().train(training), images(4)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    compiled(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    network(x).square().sum().backward()
    for ours, parameter in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict: bool) -> None:
    network = converted_network().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        network, (images(4),), dynamic_shapes=({0: batch},), strict=strict
    ).module()
    for size in (1, 2, 5):
        torch.testing.assert_close(exported(images(size)), network(images(size)))


def test_copies_and_pickles() -> None:
    network, x = converted_network().eval(), images()
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    loaded = converted_network().eval()
    assert not torch.allclose(loaded(x), network(x))
    loaded.load_state_dict(network.state_dict())
    copies = [
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(buffer, weights_only=False),
        loaded,
    ]
    for other in copies:
        torch.testing.assert_close(other(x), network(x), rtol=0, atol=0)
        assert repr(other) == repr(network) and type(other[2]) is type(network[2])
        assert [name for name, _ in other.named_parameters()] == [
            name for name, _ in network.named_parameters()
        ]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(x).any() and network(x).any(), "nothing is shared"


def test_hooks_do_not_see_a_trace() -> None:
    network = converted_network()
    network[1].conv.register_forward_hook(lambda *arguments: float(arguments[2].sum()))
    copy.deepcopy(network)(images())


def test_moving_average_and_channels_last() -> None:
    network = converted_network().eval()
    average = AveragedModel(network)
    average.update_parameters(network)
    x = images()
    torch.testing.assert_close(average(x), network(x))
    y = network(x)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), y)


def test_timms_condconv_gets_ours(timm: Any) -> None:
    network = timm.create_model("tf_efficientnet_cc_b0_8e", num_classes=10).eval()
    for name, parameter in network.named_parameters():
        if "routing_fn" in name:
            nn.init.normal_(parameter)  # new ones route all examples alike
    x, state = images(2, size=64), copy.deepcopy(network.state_dict())
    expected = network(x)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    assert accelerate_timm(network) is network
    names = [type(module).__name__ for module in network.modules()]
    assert names.count("FlatCondConv2d") == 24 and "CondConv2d" not in names
    torch.testing.assert_close(
        network(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )
    assert expected.abs().max() > 1e-6 and (expected[0] - expected[1]).abs().max() > 0

    assert network.state_dict().keys() == state.keys()
    for name, tensor in network.state_dict().items():
        assert tensor.equal(state[name])
    assert {id(item) for item in network.parameters()} == {
        id(item) for group in optimizer.param_groups for item in group["params"]
    }
    with pytest.raises(ValueError, match="EfficientNet has no CondConv2d of timm's"):
        accelerate_timm(network)


@pytest.mark.parametrize("padding", ["", "same", 0, (1, 0)])
@pytest.mark.parametrize("groups", [1, 4])
def test_timms_layer(timm: Any, padding: Any, groups: int) -> None:
    theirs = timm.layers.CondConv2d(
        4, 8, 3, stride=2, padding=padding, groups=groups, bias=groups == 1, num_experts=3
    ).double()
    x, routing_weights = images(3, 4, 8).double(), torch.rand(3, 3).double()
    ours = accelerate_timm(theirs)
    assert isinstance(ours, CondConv2d)
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(layer(x, routing_weights), theirs(x, routing_weights))
    theirs(x, routing_weights).square().sum().backward()
    expected = theirs.weight.grad.clone()
    theirs.weight.grad = None
    ours(x, routing_weights).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, expected)
    ours.reset_parameters()
    assert ours.weight.std().item() == pytest.approx((3 * 9 * 4 / groups) ** -0.5, rel=0.2)

    theirs.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        accelerate_timm(nn.Sequential(theirs))
