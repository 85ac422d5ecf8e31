from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers.cond_conv2d import CondConv2d as TimmCondConv2d
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from condconv import (
    CondConv2d,
    Conv2dSame,
    ModuleCost,
    RoutedCondConv2d,
    Router,
    cost_table,
    count_multiply_adds,
    count_parameters,
)

MIXING = 3 * (8 * 4 * 3 * 3)
CONVOLUTION = 5 * 4 * (8 * 4 * 3 * 3)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, stride=2), CONVOLUTION),
        (Conv2dSame(4, 8, 3, stride=2), CONVOLUTION),
        (nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=4), 5 * 4 * (8 * 3 * 3)),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)), 4 * 7),
        (Router(4, 3), 4 * 3),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6()), 0),
        (
            RoutedCondConv2d(4, 8, 3, padding=1, stride=2, bias=False, num_experts=3),
            CONVOLUTION + MIXING + 4 * 3,
        ),
        (  # the bias is mixed too
            RoutedCondConv2d(4, 8, 3, padding="same", stride=2, num_experts=3),
            CONVOLUTION + MIXING + 3 * 8 + 4 * 3,
        ),
        (
            RoutedCondConv2d(4, 8, 3, padding=1, stride=2, groups=4, bias=False, num_experts=3),
            5 * 4 * (8 * 3 * 3) + 3 * (8 * 3 * 3) + 4 * 3,
        ),
    ],
)
def test_multiply_adds_by_hand(module: nn.Module, expected: int) -> None:
    assert count_multiply_adds(module, torch.zeros(1, 4, 9, 8)) == expected


def test_attention_counts_on_a_cpu() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.zeros(1, 10, 64)
    # Queries, keys, values and outputs; and of the four heads together, scores and their sums.
    assert count_multiply_adds(attention, x, x, x) == 4 * 10 * 64 * 64 + 2 * 10 * 10 * 64
    assert torch.backends.mha.get_fastpath_enabled()
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    assert count_multiply_adds(block, x) == 176_640 + 2 * 10 * 64 * 128


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layer_class", [CondConv2d, partial(TimmCondConv2d, bias=True)])
def test_the_strategy_does_not_change_the_count(
    layer_class: Callable[..., nn.Module], kernel_size: int, groups: int
) -> None:
    layer = layer_class(4, 8, kernel_size, padding=0, groups=groups, num_experts=3)
    one = count_multiply_adds(layer, torch.zeros(1, 4, 9, 8), torch.zeros(1, 3))
    num_kernel = 8 * (4 // groups) * kernel_size**2
    assert one == (10 - kernel_size) * (9 - kernel_size) * num_kernel + 3 * (num_kernel + 8)
    for batch in (2, 5):
        x, routing_weights = torch.zeros(batch, 4, 9, 8), torch.zeros(batch, 3)
        assert count_multiply_adds(layer, x, routing_weights) == batch * one


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "resnet50", "resnext50_32x4d", "efficientnet_b0", "vit_b_16"]
)
def test_torchvisions_networks_cost_what_torchvision_says(name: str) -> None:
    expected = get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):
        network = get_model(name)
        rows = cost_table(network, torch.zeros(1, 3, 224, 224))
    multiply_adds = sum(row.multiply_adds for row in rows)
    assert multiply_adds / 1e9 == pytest.approx(expected["_ops"], abs=6e-4)
    assert sum(row.parameters for row in rows) == expected["num_params"]


class Reusing(nn.Module):
    """Computes by itself, between calls of a layer that it uses twice and that shares a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.layer[0].weight
        self.again = self.layer[0]
        self.scale = nn.Parameter(torch.eye(4))
        self.frozen = nn.Linear(9, 1, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.again(self.layer(x) @ self.scale) @ self.scale)


def test_every_cost_is_in_one_row() -> None:
    network = Reusing()
    x = torch.zeros(1, 4)
    assert cost_table(network, x) == [
        ModuleCost("", "Reusing", 2 * 16, 16),
        ModuleCost("layer.0", "Linear", 2 * 16, 16),
        ModuleCost("layer.1", "BatchNorm1d", 0, 8),
        ModuleCost("tied", "Linear", 16, 4),
        ModuleCost("frozen", "Linear", 0, 9),
    ]
    assert count_multiply_adds(network, x) == 5 * 16
    assert count_parameters(network) == 16 + 16 + 8 + 4 + 9


def test_rows_of_a_routed_convolution() -> None:
    network = nn.Sequential(
        nn.ReLU(), RoutedCondConv2d(4, 8, 3, padding=1, stride=2, bias=False, num_experts=3)
    )
    assert cost_table(network, torch.zeros(1, 4, 9, 8)) == [
        ModuleCost("1", "RoutedCondConv2d", CONVOLUTION + MIXING, MIXING),
        ModuleCost("1.router", "Router", 4 * 3, 0),  # it uses the linear layer's weights
        ModuleCost("1.router.linear", "Linear", 0, 5 * 3),
    ]


def test_counting_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Dropout()))
    module[1].eval()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module[0].weight.grad = torch.ones_like(module[0].weight)
    count_multiply_adds(module, torch.ones(2, 4, 9, 8, requires_grad=True))
    assert [child.training for child in module.modules()] == [True, True, False, True, True]
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    assert module[1].weight.grad is None
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_failing_forward_leaves_the_flags_too() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(RuntimeError):
        count_multiply_adds(module, torch.ones(2, 5, 9, 8))
    assert module.training and module[0].training
    assert not module[0]._forward_hooks and not module[0]._forward_pre_hooks


def test_parameters_are_counted_trainable_or_not() -> None:
    layer = RoutedCondConv2d(4, 8, 3, num_experts=3)
    layer.weight.requires_grad_(False)
    assert count_parameters(layer) == 3 * (8 * 4 * 9 + 8) + (4 * 3 + 3)
