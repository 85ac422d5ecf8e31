"""The CondConv operation: y = (a_1 W_1 + ... + a_E W_E) * x, with weights a of each example."""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.autocast import disable_autocast, is_autocast_on
from condconv.geometry import Padding, check_padding, pair, place
from condconv.operators import operator
from condconv.strategies import Strategy, choose_strategy, execute, is_channels_last, lay_out


def condconv2d(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    strategy: Strategy | None = None,
) -> Tensor:
    """Convolve each example with its own mixture of the expert kernels.

    Under autocast the kernels are mixed in the parameters' own precision and rounded once.

    Args:
        x: (B, C, H, W).
        weight: (E, O, C / groups, kh, kw) expert kernels.
        routing_weights: (B, E), one weight an expert and example.
        bias: (E, O) expert biases, mixed like the kernels.
        padding: int, pair, "valid", or "same" as TensorFlow does it (any stride).
        strategy: how to execute; None chooses from the shapes.
            "matmul": matrix products on the input's patches.
            "grouped": one convolution in which each example is a group; exports fix the batch.
            "loop": one convolution an example; exports fix the batch.
            The backward pass mixes the kernels again instead of keeping B of them: always with
            "matmul", with the others where they take more than the input and the experts. There is
            no forward-mode differentiation (`torch.func.jvp`) then.

    Returns:
        (B, O, H', W'), of the dtype and memory format that `F.conv2d` would give.

    Raises:
        ValueError: where the shapes do not fit together, or for an unknown padding or strategy.
    """
    _check_shapes(x, weight, routing_weights, bias, groups)
    if strategy is not None and strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")
    check_padding(padding)

    if is_autocast_on(x) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: convert one of them")
    if routing_weights.dtype != weight.dtype:
        routing_weights = routing_weights.to(weight.dtype)
    stride, dilation = pair(stride), pair(dilation)
    channels_last = is_channels_last(x)
    # What `torch.jit.trace` records has to hold for other batches, as an exported graph.
    is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    exports = is_traced or torch.compiler.is_exporting()
    with disable_autocast(x):
        if weight.shape[0] == 1 and strategy is None:
            # One expert: scaling the output is scaling the kernel.
            x, geometry = place(x, weight, stride, padding, dilation, groups)
            y = F.conv2d(x, weight[0].to(x.dtype), None, *geometry)
            y = y * routing_weights.to(x.dtype)[:, :, None, None]
        elif not (exports or torch.compiler.is_compiling()):
            x, geometry = place(x, weight, stride, padding, dilation, groups)
            strategy = strategy or choose_strategy(x, weight, geometry)
            y = execute(x, weight, routing_weights, geometry, strategy)
        elif exports:
            x, geometry = place(x, weight, stride, padding, dilation, groups)
            if is_traced:  # numbers that depend on the size of x are tensors there
                geometry = geometry._replace(padding=pair([int(size) for size in geometry.padding]))
            y = torch.ops.condconv.exported(x, weight, routing_weights, None, *geometry)
        else:
            same = padding == "same"
            pads = (0, 0) if isinstance(padding, str) else pair(padding)
            y = operator(x, weight, routing_weights, stride, pads, dilation, groups, same, strategy)
        if bias is not None:
            y = y + (routing_weights @ bias.to(weight.dtype)).to(y.dtype)[:, :, None, None]
    # A layout is not part of an exported graph, in which batch norm follows and is folded.
    return y if exports else lay_out(y, channels_last)


def _check_shapes(
    x: Tensor, weight: Tensor, routing_weights: Tensor, bias: Tensor | None, groups: int
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    if weight.dim() != 5:
        raise ValueError(f"weight must be (E, O, C / groups, kh, kw), got {tuple(weight.shape)}")
    batch, in_channels, _, _ = x.shape
    num_experts, out_channels, channels, _, _ = weight.shape
    if in_channels != channels * groups:
        raise ValueError(f"x has {in_channels} channels, the kernels take {channels * groups}")
    if out_channels % groups:
        raise ValueError(f"{out_channels} output channels cannot be split into {groups} groups")
    if routing_weights.shape != (batch, num_experts):
        raise ValueError(
            f"routing_weights must be (B, E) = {(batch, num_experts)}, "
            f"got {tuple(routing_weights.shape)}"
        )
    if bias is not None and bias.shape != (num_experts, out_channels):
        raise ValueError(
            f"bias must be (E, O) = {(num_experts, out_channels)}, got {tuple(bias.shape)}"
        )
