"""What is chosen, from shapes alone."""

from __future__ import annotations

import pytest
import torch

from condconv import strategies
from condconv.geometry import Geometry


def same_size(kernel_size: int, groups: int) -> Geometry:
    """The output is as large as the input."""
    return Geometry((1, 1), (kernel_size // 2, kernel_size // 2), (1, 1), groups)


def test_kernels_are_mixed_in_even_blocks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(2, 100, 3)
    assert strategies._block_size(3, weight) == (3, 100)
    assert strategies._block_size(30, weight) == (8, 100)
    monkeypatch.setattr(strategies, "MIXED_BYTES", 8 * 30 * 3 * 4)
    monkeypatch.setattr(strategies, "MIN_CHANNELS", 10)
    assert strategies._block_size(30, weight) == (8, 25)
    assert strategies._block_size(4, weight) == (4, 50)
    monkeypatch.setattr(strategies, "MIN_CHANNELS", 64)
    assert strategies._block_size(30, weight) == (8, 100)


@pytest.mark.parametrize(
    ("batch", "kernel_size", "size", "groups", "expected"),
    [
        (8, 1, 38, 1, "matmul"),
        (8, 3, 8, 1, "matmul"),
        (8, 3, 10, 1, "grouped"),
        (8, 3, 19, 1, "grouped"),
        (32, 3, 19, 1, "loop"),
        (32, 3, 10, 1, "loop"),
        (32, 3, 8, 1, "matmul"),
        (32, 3, 19, 256, "grouped"),
        (8, 1, 19, 8, "matmul"),
        (8, 1, 19, 256, "grouped"),
        (1, 1, 19, 1, "grouped"),
    ],
)
def test_the_strategy_follows_from_the_shapes(
    batch: int, kernel_size: int, size: int, groups: int, expected: str
) -> None:
    x = torch.empty(1, 1, 1, 1).expand(batch, 256, size, size)
    weight = torch.empty(1, 1, 1, 1, 1).expand(8, 256, 256 // groups, kernel_size, kernel_size)
    assert strategies.choose_strategy(x, weight, same_size(kernel_size, groups)) == expected


@pytest.mark.parametrize(
    ("batch", "size", "expected"),
    [(1, 38, "grouped"), (8, 38, "loop"), (8, 10, "grouped"), (0, 38, "grouped")],
)
def test_depthwise_kernels_on_channels_last_maps_are_applied_in_turn(
    batch: int, size: int, expected: str
) -> None:
    x = torch.empty(batch, 64, size, size, memory_format=torch.channels_last)
    weight = torch.empty(8, 64, 1, 3, 3)
    assert strategies.choose_strategy(x, weight, same_size(3, 64)) == expected
    assert strategies.choose_strategy(x.contiguous(), weight, same_size(3, 64)) == "grouped"
