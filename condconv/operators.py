"""What compilers and exporters see of a CondConv: one operator for each call.

Shapes: B batch, E experts, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv.geometry import Geometry, output_size, pair, place
from condconv.strategies import (
    Strategy,
    choose_strategy,
    gather_patches,
    is_channels_last,
    join_groups,
    lay_out,
    mix,
    run_backward,
    run_forward,
    save_inputs,
    split_groups,
)


def _export(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """What an exporter sees of `condconv2d`: one node, to be translated as suits the runtime.

    Decomposed, it is matrix products that hold for every batch size.

    Args:
        bias: (O,), the same for all examples; `condconv2d` gives none.
    """
    geometry = Geometry(pair(stride), pair(padding), pair(dilation), groups)
    kernel_size = weight.shape[3:]
    sizes = output_size(x, weight, geometry)
    if kernel_size == (1, 1) and geometry.padding == (0, 0):
        patches = gather_patches(x, weight, geometry)
    else:
        # `unfold` becomes gathers by index tables, which take longer than all the rest.
        rows, columns = (
            [slice(i * gap, i * gap + (size - 1) * step + 1, step) for i in range(length)]
            for length, size, step, gap in zip(kernel_size, sizes, stride, dilation, strict=True)
        )
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        patches = [x[:, :, row, column] for row in rows for column in columns]
        patches = torch.stack(patches, dim=2).flatten(1, 2).flatten(2)
    kernels = mix(weight, routing_weights, x.dtype, weight.flatten(2).shape[1:])
    y = torch.bmm(split_groups(kernels, groups), split_groups(patches, groups))
    y = join_groups(y, groups).unflatten(2, sizes)
    return y if bias is None else y + bias[:, None, None]


# One that is implicitly made of others: exporters that do not know it decompose it.
torch.library.define(
    "condconv::exported",
    "(Tensor x, Tensor weight, Tensor routing_weights, Tensor? bias, int[] stride, "
    "SymInt[] padding, int[] dilation, int groups) -> Tensor",
)
torch.library.impl("condconv::exported", "CompositeImplicitAutograd", _export)


@torch.library.custom_op("condconv::condconv2d", mutates_args=())
def operator(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    same: bool,
    strategy: str | None,
) -> Tensor:
    """What a compiler sees of `condconv2d`: one node, which executes as it would without one.

    Its graph then holds for every batch size, where inductor's convolution would fix the number of
    groups, and kernels are mixed in parts.
    """
    channels_last = is_channels_last(x)
    x, geometry, choice = _unpack(x, weight, stride, padding, dilation, groups, same, strategy)
    return lay_out(run_forward(x, weight, routing_weights, geometry, choice), channels_last)


@operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    same: bool,
    strategy: str | None,
) -> Tensor:
    if same:
        size = [-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True)]
    else:
        geometry = Geometry(pair(stride), pair(padding), pair(dilation), groups)
        size = output_size(x, weight, geometry)
    return lay_out(x.new_empty(x.shape[0], weight.shape[1], *size), is_channels_last(x))


@torch.library.custom_op("condconv::condconv2d_backward", mutates_args=())
def _operator_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    same: bool,
    strategy: str | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    padded, geometry, choice = _unpack(x, weight, stride, padding, dilation, groups, same, strategy)
    grad_x, *grads = run_backward(grad_y, padded, weight, routing_weights, geometry, choice, needs)
    if grad_x is not None:
        (height, width), (padded_height, padded_width) = x.shape[2:], padded.shape[2:]
        top, left = (padded_height - height) // 2, (padded_width - width) // 2
        grad_x = grad_x[:, :, top : top + height, left : left + width]
        grad_x = lay_out(grad_x, is_channels_last(x))
    others = [grad.contiguous() for grad in grads if grad is not None]
    return others if grad_x is None else [grad_x, *others]


@_operator_backward.register_fake
def _(grad_y: Tensor, *inputs: Any) -> list[Tensor]:
    x, *others = inputs[:3]
    needs_x, *needs = inputs[-1]
    grads = [
        tensor.new_empty(tensor.shape) for tensor, need in zip(others, needs, strict=True) if need
    ]
    return [lay_out(x.new_empty(x.shape), is_channels_last(x)), *grads] if needs_x else grads


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = iter(_operator_backward(grad_y, *ctx.saved_tensors, *ctx.options, needs))
    return *(next(grads) if need else None for need in needs), *[None] * 6


operator.register_autograd(_backward, setup_context=save_inputs)


def _unpack(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    same: bool,
    strategy: Any,
) -> tuple[Tensor, Geometry, Strategy]:
    """What an operator's arguments, which know fewer types, stand for."""
    pads = "same" if same else pair(padding)
    x, geometry = place(x, weight, pair(stride), pads, pair(dilation), groups)
    return x, geometry, strategy or choose_strategy(x, weight, geometry)
