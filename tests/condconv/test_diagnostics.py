from __future__ import annotations

import json
import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from condconv import (
    CondConv2d,
    RoutedCondConv2d,
    Router,
    accelerate_timm,
    capture_routing,
    compare_experts,
    condconv2d,
    convert_to_condconv,
    summarize_routing,
)


def make_router(logits: list[float]) -> Router:
    """Routes every example alike: sigmoid of the logits plus the mean of its first channel."""
    router = Router(2, len(logits))
    with torch.no_grad():
        router.linear.weight.copy_(torch.tensor([1.0, 0.0]).expand(len(logits), 2))
        router.linear.bias.copy_(torch.tensor(logits))
    return router


def make_images(*means: float) -> Tensor:
    """(len(means), 2, 3, 3) with the means in the first channel."""
    images = torch.zeros(len(means), 2, 3, 3)
    images[:, 0] = torch.tensor(means)[:, None, None]
    return images


class TwoBranches(nn.Module):
    """A router that runs twice, one that runs once, one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.late = RoutedCondConv2d(2, 2, 1, num_experts=2)
        self.unused = Router(2, 2)
        self.shared = make_router([0.0, 1.0, 2.0])
        self.conv = CondConv2d(2, 2, 1, num_experts=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x, self.shared(x)) + self.conv(x, self.shared(2 * x))
        return self.late(y)


def test_captured_weights_are_those_that_mixed_the_kernels() -> None:
    network = TwoBranches()
    x = make_images(0.5, -1.0)
    with capture_routing(network) as routing:
        y = network(x)
    assert list(routing) == ["shared", "late.router"]
    expected = torch.sigmoid(
        torch.tensor([0.5, -1.0, 1.0, -2.0])[:, None] + torch.tensor([0.0, 1.0, 2.0])
    )
    torch.testing.assert_close(routing["shared"], expected)
    branches = [condconv2d(x, network.conv.weight, weights, network.conv.bias)
                for weights in routing["shared"].split(2)]  # fmt: skip
    torch.testing.assert_close(network.late(sum(branches), routing["late.router"]), y)


def test_calls_are_joined_detached_on_the_cpu() -> None:
    router = make_router([0.0])
    means = [[0.5, -1.0], [2.0], [0.0, 0.1, -3.0]]
    with capture_routing(router) as routing:
        for part in means:
            router(make_images(*part).requires_grad_())
        before_the_end = routing[""].clone()
    expected = torch.cat([torch.tensor(part).sigmoid()[:, None] for part in means])
    torch.testing.assert_close(routing[""], expected)
    assert torch.equal(before_the_end, routing[""])
    assert not routing[""].requires_grad and routing[""].device.type == "cpu"


def test_captures_nest() -> None:
    network = nn.Sequential(make_router([0.0]))
    with capture_routing(network) as outer:
        network(make_images(0.0))
        with capture_routing(network) as inner, capture_routing(network[0]) as part:
            network(make_images(1.0, 2.0))
        network(make_images(3.0))
    assert outer["0"].shape == (4, 1)
    assert torch.equal(inner["0"], outer["0"][1:3]) and torch.equal(part[""], inner["0"])


def test_hooks_go_on_errors_too() -> None:
    network = nn.Sequential(make_router([0.0]), nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match="shapes"), capture_routing(network) as routing:
        network(make_images(0.0))
    assert routing["0"].shape == (1, 1)
    network[0](make_images(0.0))
    assert routing["0"].shape == (1, 1)


def test_shared_routing_of_converted_blocks_is_captured() -> None:
    network = convert_to_condconv(
        nn.Sequential(BasicBlock(2, 2), nn.Conv2d(2, 4, 1)),
        4,
        share_within=lambda _, module: isinstance(module, BasicBlock),
    )
    with capture_routing(network) as routing:
        network(make_images(1.0, 2.0))
    # A converted network starts with all weights at 1 / sqrt(E).
    assert list(routing) == ["0.router", "1.router"]
    for weights in routing.values():
        torch.testing.assert_close(weights, torch.full((2, 4), 0.5))


@pytest.mark.parametrize("accelerate", [False, True])
def test_timms_own_routing_is_captured(accelerate: bool) -> None:
    network = timm.create_model("tf_efficientnet_cc_b0_4e").eval()
    if accelerate:
        accelerate_timm(network)
    seen = []
    network.blocks[6][0].conv_pw.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad(), capture_routing(network) as routing:
        network(torch.randn(2, 3, 32, 32))
    blocks = [f"blocks.{stage}.{block}" for stage, num in ((4, 3), (5, 4), (6, 1))
              for block in range(num)]  # fmt: skip
    assert list(routing) == [f"{block}.routing_fn" for block in blocks]
    torch.testing.assert_close(routing["blocks.6.0.routing_fn"], seen[0])


def test_what_cannot_be_captured_is_said() -> None:
    with pytest.raises(ValueError, match="Conv2d has no router"):
        capture_routing(nn.Conv2d(2, 2, 1)).__enter__()
    compiled = torch.compile(nn.Sequential(make_router([0.0])), backend="eager")
    compiled(make_images(0.0))
    with pytest.raises(ValueError, match="no router ran"), capture_routing(compiled):
        compiled(make_images(0.0))
    torch.compiler.reset()


def test_summary_by_hand() -> None:
    # Weights 0.5, 0.5 and 0.9, 0.1: entropies ln 2 and 0.325083.
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    summary = summarize_routing({"a": weights})["a"]
    assert summary.mean == pytest.approx([0.7, 0.3])
    assert summary.deviation == pytest.approx([0.2, 0.2])
    assert summary.entropy == pytest.approx((math.log(2) + 0.325083) / 2, abs=1e-6)
    assert summary.saturated == 0 and summary.unused == []
    json.dumps(summary._asdict())


@pytest.mark.parametrize(
    ("logits", "entropy", "saturated"),
    [
        ([0.0, 0.0, 0.0, 0.0], math.log(4), 0.0),
        ([3.0, 3.0], math.log(2), 0.0),  # their sum does not matter
        ([9.0, -9.0, -9.0, -9.0], 0.003701, 1.0),  # collapsed
        ([5.0, -5.0, 0.0, 4.0], 1.072074, 0.5),
        ([-800.0, -800.0], 0.0, 1.0),  # all weights vanish
        ([2.0], 0.0, 0.0),  # one expert
    ],
)
def test_summary_of_constructed_routers(
    logits: list[float], entropy: float, saturated: float
) -> None:
    router = make_router(logits)
    with capture_routing(router) as routing:
        router(make_images(0.0, 0.0, 0.0))
    summary = summarize_routing(routing)[""]
    assert summary.mean == pytest.approx(torch.tensor(logits).sigmoid().tolist())
    assert summary.deviation == pytest.approx([0.0] * len(logits), abs=1e-6)
    assert summary.entropy == pytest.approx(entropy, abs=1e-6)
    assert summary.saturated == saturated


def test_unused_experts_weigh_nothing_for_any_example() -> None:
    weights = torch.tensor([[0.009, 0.0, 0.5, 0.0], [0.009, 0.5, 0.5, 0.0]])
    assert summarize_routing({"a": weights})["a"].unused == [0, 3]


def test_compared_experts() -> None:
    layer = CondConv2d(1, 2, 1, bias=False, num_experts=3)
    with torch.no_grad():
        layer.weight.copy_(
            torch.tensor([[1.0, 0.0], [3.0, 3.0], [-2.0, 0.0]])[..., None, None, None]
        )
    (similarity,) = compare_experts(nn.Sequential(layer)).values()
    half = math.sqrt(0.5)
    expected = torch.tensor([[1.0, half, -1.0], [half, 1.0, -half], [-1.0, -half, 1.0]])
    torch.testing.assert_close(similarity, expected)
    assert list(compare_experts(TwoBranches())) == ["late", "conv"]
    assert compare_experts(nn.Conv2d(2, 2, 1)) == {}
