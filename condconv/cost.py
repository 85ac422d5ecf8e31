"""What a network costs: multiply-adds and parameters, as a whole and module by module."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from condconv.modes import keep_modes


class ModuleCost(NamedTuple):
    """What one module costs by itself, the modules inside it left out.

    Args:
        name: in the network, "" for the network itself.
        type: name of its class.
        multiply_adds: of the operations that it runs itself.
        parameters: numbers that it holds itself, trainable or not.
    """

    name: str
    type: str
    multiply_adds: int
    parameters: int


def cost_table(module: nn.Module, *inputs: Any) -> list[ModuleCost]:
    """The modules that cost something, in the order of `module.named_modules()`.

    Counts convolutions and matrix products: linear layers, attention, and for CondConv also the
    mixing of the kernels and the routing; no batch norm, no activations, as papers count. The
    rows add up to `count_multiply_adds` and `count_parameters`: what a module computes by itself,
    as attention often is, is a row of its own, and a parameter that several modules share counts
    once. An `nn.LSTM` counts nothing on a CPU. Give a batch of one for the cost of one example; on
    the meta device nothing is computed.
    """
    names = {child: name for name, child in module.named_modules()}
    multiply_adds: Counter[str] = Counter()
    running = [""]  # what runs outside of every module would count for the network
    counted = 0

    def count_for_running() -> None:
        nonlocal counted
        # The counter counts a multiplication and an addition as two operations.
        total = counter.get_total_flops() // 2
        multiply_adds[running[-1]] += total - counted
        counted = total

    def enter(child: nn.Module, _: Any) -> None:
        count_for_running()
        running.append(names[child])

    def leave(*_: Any) -> None:
        count_for_running()
        running.pop()

    handles = [child.register_forward_pre_hook(enter) for child in names]
    handles += [child.register_forward_hook(leave) for child in names]
    # On a CPU, the kernels that compute attention in one are unknown to the counter.
    fastpath = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with (
            keep_modes(names),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            module.eval()
            module(*inputs)
    finally:
        mha.set_fastpath_enabled(fastpath)
        for handle in handles:
            handle.remove()

    parameters: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        parameters[name.rpartition(".")[0]] += parameter.numel()
    return [
        ModuleCost(name, type(child).__name__, multiply_adds[name], parameters[name])
        for child, name in names.items()
        if multiply_adds[name] or parameters[name]
    ]


def count_multiply_adds(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of `module(*inputs)`: the sum over `cost_table`."""
    return sum(row.multiply_adds for row in cost_table(module, *inputs))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
