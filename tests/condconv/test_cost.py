from __future__ import annotations

import pytest
import torch
from torch import nn

from condconv import (
    CondConv2d,
    Conv2dSame,
    RoutedCondConv2d,
    Router,
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


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_strategy_does_not_change_the_count(kernel_size: int, groups: int) -> None:
    layer = CondConv2d(4, 8, kernel_size, groups=groups, num_experts=3)
    one = count_multiply_adds(layer, torch.zeros(1, 4, 9, 8), torch.zeros(1, 3))
    for batch in (2, 5):
        x, routing_weights = torch.zeros(batch, 4, 9, 8), torch.zeros(batch, 3)
        assert count_multiply_adds(layer, x, routing_weights) == batch * one


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


def test_a_failing_forward_leaves_the_flags_too() -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(RuntimeError):
        count_multiply_adds(module, torch.ones(2, 5, 9, 8))
    assert module.training and module[0].training


def test_parameters_are_counted_trainable_or_not() -> None:
    layer = RoutedCondConv2d(4, 8, 3, num_experts=3)
    layer.weight.requires_grad_(False)
    assert count_parameters(layer) == 3 * (8 * 4 * 9 + 8) + (4 * 3 + 3)
