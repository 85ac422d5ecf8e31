"""What a network costs: multiply-adds and parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_multiply_adds(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of `module(*inputs)`.

    Counts convolutions and matrix products: linear layers, and for CondConv also the mixing of
    the kernels and the routing. No batch norm, no activations, as papers count. Give a batch of
    one for the cost of one example.
    """
    training = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
    finally:
        for name, child in module.named_modules():
            child.training = training[name]
    # The counter counts a multiplication and an addition as two operations.
    return counter.get_total_flops() // 2


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
