"""The CondConv operation: y = (a_1 W_1 + ... + a_E W_E) * x, with weights a of each example.

Shapes: B batch, E experts, C input channels, O output channels, G groups, K = C / G * kh * kw the
elements of one output channel's kernel, L = H' * W' output positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = int | tuple[int, int] | Literal["same", "valid"]
Strategy = Literal["matmul", "grouped", "loop"]

# Measured on a CPU (float32, 8 experts).
MAX_PATCHES = 64  # output positions up to which gathering the patches of a k x k kernel pays
MAX_GROUPED_BYTES = 32 * 2**20  # of the batch's mixed kernels, up to which one convolution pays
MIXED_BYTES = 8 * 2**20  # mixed kernels at a time,
MAX_EXAMPLES = 8  # of this many examples: with more, the stores of the mixing collide in the cache
MIN_CHANNELS = 64  # smaller blocks make slow matrix products


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """One number for both axes, or (vertical, horizontal)."""
    if isinstance(value, int):
        return value, value
    vertical, horizontal = value
    return vertical, horizontal


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis: (before, after).

    The output has ceil(size / stride) positions; an odd total puts the extra element after
    (https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2).
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel_size - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def pad_input(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """Split a padding into what must be added to `x` now and what a convolution can add itself.

    Returns:
        (x, padding): convolving the returned x with the symmetric padding gives the asked result.
        x is copied only where "same" is not symmetric.

    Raises:
        ValueError: where `padding` is an unknown word.
    """
    if padding == "valid":
        return x, (0, 0)
    if not isinstance(padding, str):
        return x, pair(padding)
    if padding != "same":
        raise ValueError(f'padding must be an int, a pair, "same" or "valid", got {padding!r}')
    top, bottom = same_padding(x.shape[-2], kernel_size[0], stride[0], dilation[0])
    left, right = same_padding(x.shape[-1], kernel_size[1], stride[1], dilation[1])
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is in force; devices without it (meta) included."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def disable_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Compute in the tensors' own precision."""
    # Where there is nothing to disable, the context alone would cost as much as a small layer.
    if is_autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


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
    stride, dilation = pair(stride), pair(dilation)
    _check_shapes(x, weight, routing_weights, bias, groups)
    if strategy is not None and strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")

    device_type = x.device.type
    if is_autocast_on(device_type) and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: convert one of them")
    if routing_weights.dtype != weight.dtype:
        routing_weights = routing_weights.to(weight.dtype)
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    x, symmetric = pad_input(x, (weight.shape[3], weight.shape[4]), stride, padding, dilation)
    output_size = _output_size(x, weight, stride, symmetric, dilation)

    with disable_autocast(device_type):
        if weight.shape[0] == 1 and strategy is None:
            # One expert: scaling the output is scaling the kernel.
            y = F.conv2d(x, weight[0].to(x.dtype), None, stride, symmetric, dilation, groups)
            y = y * routing_weights.to(x.dtype)[:, :, None, None]
        else:
            strategy = strategy or choose_strategy(x, weight, output_size, groups)
            if strategy == "matmul" or x.shape[0] == 0:
                y = _matmul(x, weight, routing_weights, stride, symmetric, dilation, groups)
                y = y.unflatten(2, output_size)
            else:
                at_once = x.shape[0] if strategy == "grouped" else 1
                y = _convolve(
                    x, weight, routing_weights, stride, symmetric, dilation, groups, at_once
                )
        if bias is not None:
            y = y + (routing_weights @ bias.to(weight.dtype)).to(y.dtype)[:, :, None, None]
    return y.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def choose_strategy(
    x: Tensor, weight: Tensor, output_size: tuple[int, int], groups: int
) -> Strategy:
    """The strategy that measures fastest for the shapes, or the one that exports."""
    if torch.compiler.is_exporting():
        return "matmul"
    if groups > 1 or x.shape[0] == 1:
        return "grouped"
    num_patches = output_size[0] * output_size[1]
    if weight.shape[3:] == (1, 1) or num_patches <= MAX_PATCHES:
        return "matmul"
    num_bytes = x.shape[0] * weight[0].numel() * weight.element_size()
    if x.device.type == "cpu" and num_bytes > MAX_GROUPED_BYTES:
        return "loop"
    return "grouped"


def _mix(weight: Tensor, routing_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (E, O, ...), routing_weights (B, E) -> the kernel of each example (B, O, ...)."""
    kernels = routing_weights @ weight.flatten(1)
    # Asking for what is there already costs as much as some small layers' arithmetic, here and
    # below.
    if kernels.dtype != dtype:
        kernels = kernels.to(dtype)
    return kernels.view(-1, *weight.shape[1:])


def _need_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _keeps_kernels(x: Tensor, weight: Tensor) -> bool:
    """Whether to keep mixed kernels for the backward pass, or to mix them again.

    Where they take less than the input or the experts, which are there in any case, mixing again
    saves little memory.
    """
    if torch.compiler.is_compiling():
        return False  # The graph is not to depend on the batch.
    batch, num_experts = x.shape[0], weight.shape[0]
    return batch <= num_experts or batch * weight.numel() <= num_experts * x.numel()


def _convolve(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    at_once: int,
) -> Tensor:
    """`at_once` examples are the groups of one convolution."""
    options = (stride, padding, dilation, groups)
    if _need_gradients(x, weight, routing_weights) and not _keeps_kernels(x, weight):
        y = _MixedConvolution.apply(x, weight, routing_weights, *options, at_once)
        assert isinstance(y, Tensor)
        return y
    if at_once == x.shape[0]:  # a short way, as its overhead is felt in small layers
        return _convolve_groups(x, _mix(weight, routing_weights, x.dtype), *options)
    return _MixedConvolution.forward(x, weight, routing_weights, *options, at_once)


def _convolve_groups(
    x: Tensor,
    kernels: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """x (B, C, H, W), kernels (B, O, C / G, kh, kw) -> (B, O, H', W'), in one convolution."""
    batch = x.shape[0]
    x, kernels = _join_examples(x), kernels.flatten(0, 1)
    y = F.conv2d(x, kernels, None, stride, padding, dilation, batch * groups)
    return y if batch == 1 else y.view(batch, -1, *y.shape[2:])


class _MixedConvolution(torch.autograd.Function):
    """`_convolve` with a backward pass that mixes the kernels again instead of keeping them.

    Every step is differentiable: gradients of gradients come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        routing_weights: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        at_once: int,
    ) -> Tensor:
        outputs = []
        step = _examples_at_once(weight, at_once)
        for part, weights in zip(_split(x, step), _split(routing_weights, step), strict=True):
            kernels = _mix(weight, weights, x.dtype)
            outputs += [
                _convolve_groups(examples, kernel, stride, padding, dilation, groups)
                for examples, kernel in zip(
                    _split(part, at_once), _split(kernels, at_once), strict=True
                )
            ]
        return _concatenate(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, routing_weights = ctx.saved_tensors
        stride, padding, dilation, groups, at_once = ctx.options
        needs_x, needs_weight, needs_routing = ctx.needs_input_grad[:3]
        needs_kernels = needs_weight or needs_routing
        grad_weight = None
        grads_x, grads_routing = [], []
        step = _examples_at_once(weight, at_once)
        with disable_autocast(x.device.type):
            for grad_part, part, weights in zip(
                *(_split(tensor, step) for tensor in (grad_outputs[0], x, routing_weights)),
                strict=True,
            ):
                kernels = _mix(weight, weights, x.dtype)
                grads_kernels = []
                for grad_y, examples, kernel in zip(
                    *(_split(tensor, at_once) for tensor in (grad_part, part, kernels)), strict=True
                ):
                    num = examples.shape[0]
                    grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(
                        _join_examples(grad_y),
                        _join_examples(examples),
                        kernel.flatten(0, 1),
                        None,
                        stride,
                        padding,
                        dilation,
                        False,
                        (0, 0),
                        num * groups,
                        (needs_x, needs_kernels, False),
                    )
                    if needs_x:
                        grads_x.append(grad_x.reshape(examples.shape))
                    if needs_kernels:
                        grads_kernels.append(grad_kernel.reshape(num, -1))
                if needs_kernels:
                    grad_kernels = _concatenate(grads_kernels).to(weight.dtype)
                    if needs_weight:
                        grad_weight = _add_product(weights.t(), grad_kernels, grad_weight)
                    if needs_routing:
                        grads_routing.append(grad_kernels @ weight.flatten(1).t())
        return (
            _concatenate(grads_x) if needs_x else None,
            None if grad_weight is None else grad_weight.view_as(weight),
            _concatenate(grads_routing) if needs_routing else None,
            *[None] * 5,
        )


def _examples_at_once(weight: Tensor, at_once: int) -> int:
    """Examples to mix the kernels of, where `at_once` are convolved."""
    return max(MAX_EXAMPLES, at_once) if _works_in_parts(weight) else at_once


def _works_in_parts(weight: Tensor) -> bool:
    """Whether to mix some kernels at a time: a static function of where the work is done."""
    # A compiler gets one product: its graph neither grows nor depends on the batch.
    return weight.device.type == "cpu" and not torch.compiler.is_compiling()


def _join_examples(tensor: Tensor) -> Tensor:
    """(n, C, H, W) -> (1, n * C, H, W)."""
    return tensor if tensor.shape[0] == 1 else tensor.reshape(1, -1, *tensor.shape[2:])


def _split(tensor: Tensor, size: int, dim: int = 0) -> Sequence[Tensor]:
    return (tensor,) if tensor.shape[dim] <= size else tensor.split(size, dim)


def _concatenate(tensors: list[Tensor], dim: int = 0, as_rows: bool = False) -> Tensor:
    """`torch.cat`; of tensors (B, O, L) that are laid out as (B, L, O) where `as_rows`."""
    if len(tensors) == 1:
        return tensors[0]
    if as_rows:
        return torch.cat([tensor.mT for tensor in tensors], 2 if dim == 1 else 0).mT
    return torch.cat(tensors, dim)


def _add_product(a: Tensor, b: Tensor, total: Tensor | None) -> Tensor:
    return a @ b if total is None else total.addmm_(a, b)


def _matmul(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    kernel_size = (weight.shape[3], weight.shape[4])
    if kernel_size == (1, 1) and padding == (0, 0):
        patches = x[:, :, :: stride[0], :: stride[1]].flatten(2)
    else:
        patches = F.unfold(x, kernel_size, dilation, padding, stride)
    arguments = (patches, weight.flatten(2), routing_weights, groups)
    if torch.compiler.is_exporting() or not _need_gradients(patches, weight, routing_weights):
        return _MixedMatmul.forward(*arguments)
    y = _MixedMatmul.apply(*arguments)
    assert isinstance(y, Tensor)
    return y


class _MixedMatmul(torch.autograd.Function):
    """patches (B, G * K, L), weight (E, O, K), routing_weights (B, E), G -> (B, O, L).

    The backward pass mixes the kernels again instead of keeping them. Both passes mix those of
    some examples and some output channels at a time, so that they stay in the cache. Every step
    is differentiable: gradients of gradients come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(patches: Tensor, weight: Tensor, routing_weights: Tensor, groups: int) -> Tensor:
        examples, channels = _block_size(patches, weight, groups)
        as_rows = _are_rows(patches)
        parts = [
            (_split_groups(part, groups), weights)
            for part, weights in zip(
                _split(patches, examples), _split(routing_weights, examples), strict=True
            )
        ]
        outputs = []
        for block in _split(weight, channels, dim=1):
            pieces = []
            for part, weights in parts:
                kernels = _split_groups(_mix(block, weights, part.dtype), groups)
                pieces.append(_join_groups(_multiply(kernels, part, as_rows), groups))
            outputs.append(_concatenate(pieces, dim=0, as_rows=as_rows))
        return _concatenate(outputs, dim=1, as_rows=as_rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.groups = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        patches, weight, routing_weights = ctx.saved_tensors
        needs_patches, needs_weight, needs_routing, _ = ctx.needs_input_grad
        groups = ctx.groups
        examples, channels = _block_size(patches, weight, groups)
        as_rows = _are_rows(patches)
        blocks = _split(weight, channels, dim=1)
        grad_blocks: list[Any] = [None] * len(blocks)
        grads_patches: list[Any] = []
        grads_routing: list[Any] = []
        with disable_autocast(patches.device.type):
            for grad_part, part, weights in zip(
                *(
                    _split(tensor, examples)
                    for tensor in (grad_outputs[0], patches, routing_weights)
                ),
                strict=True,
            ):
                part = _split_groups(part, groups)
                grad_patches = grad_routing = None
                for i, (block, grad_y) in enumerate(
                    zip(blocks, _split(grad_part, channels, dim=1), strict=True)
                ):
                    grad_y = _split_groups(grad_y, groups)
                    if needs_patches:
                        kernels = _split_groups(_mix(block, weights, part.dtype), groups)
                        grad_patches = _multiply(kernels.mT, grad_y, as_rows, grad_patches)
                    if needs_weight or needs_routing:
                        grad_kernels = _join_groups(torch.bmm(grad_y, part.mT), groups)
                        grad_kernels = grad_kernels.flatten(1).to(weight.dtype)
                        if needs_weight:
                            grad_blocks[i] = _add_product(weights.t(), grad_kernels, grad_blocks[i])
                        if needs_routing:
                            term = grad_kernels @ block.flatten(1).t()
                            grad_routing = term if grad_routing is None else grad_routing + term
                grads_patches.append(grad_patches)
                grads_routing.append(grad_routing)
        return (
            _join_groups(_concatenate(grads_patches, as_rows=as_rows), groups)
            if needs_patches
            else None,
            torch.cat(
                [grad.view_as(block) for grad, block in zip(grad_blocks, blocks, strict=True)],
                dim=1,
            )
            if needs_weight
            else None,
            _concatenate(grads_routing) if needs_routing else None,
            None,
        )


def _are_rows(patches: Tensor) -> bool:
    """Whether to hold patches (B, K, L) and outputs as rows (B, L, K): a channels_last layout.

    Few patches make much faster products that way, many are not worth a copy.
    """
    if torch.compiler.is_exporting():
        return False
    return patches.shape[2] <= MAX_PATCHES or patches.stride(1) == 1


def _multiply(a: Tensor, b: Tensor, as_rows: bool, total: Tensor | None = None) -> Tensor:
    """a @ b, added to `total` in place where given; laid out as columns or as rows."""
    if as_rows:
        return _multiply(b.mT, a.mT, False, None if total is None else total.mT).mT
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def _block_size(patches: Tensor, weight: Tensor, groups: int) -> tuple[int, int]:
    """Examples and output channels to mix the kernels of at a time: a static function of shapes."""
    batch, channels = patches.shape[0], weight.shape[1]
    if not _works_in_parts(weight):
        return batch, channels
    examples = min(batch, MAX_EXAMPLES)
    if groups > 1:
        return examples, channels
    num_bytes = examples * weight[0].numel() * weight.element_size()
    num_blocks = min(-(-num_bytes // MIXED_BYTES), channels // MIN_CHANNELS)
    return examples, -(-channels // max(num_blocks, 1))


def _split_groups(tensor: Tensor, groups: int) -> Tensor:
    """(B, G * n, m) -> (B * G, n, m)."""
    return tensor if groups == 1 else tensor.unflatten(1, (groups, -1)).flatten(0, 1)


def _join_groups(tensor: Tensor, groups: int) -> Tensor:
    """(B * G, n, m) -> (B, G * n, m)."""
    return tensor if groups == 1 else tensor.unflatten(0, (-1, groups)).flatten(1, 2)


def _output_size(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    *_, rows, columns = x.shape
    *_, kernel_rows, kernel_columns = weight.shape
    height = (rows + 2 * padding[0] - dilation[0] * (kernel_rows - 1) - 1) // stride[0] + 1
    width = (columns + 2 * padding[1] - dilation[1] * (kernel_columns - 1) - 1) // stride[1] + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"the kernel {tuple(weight.shape[3:])} with dilation {dilation} does not fit into "
            f"the input {tuple(x.shape[2:])} with padding {padding}"
        )
    return height, width


def _check_shapes(
    x: Tensor, weight: Tensor, routing_weights: Tensor, bias: Tensor | None, groups: int
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    if weight.dim() != 5:
        raise ValueError(f"weight must be (E, O, C / groups, kh, kw), got {tuple(weight.shape)}")
    num_experts, out_channels, channels = weight.shape[:3]
    if x.shape[1] != channels * groups:
        raise ValueError(f"x has {x.shape[1]} channels, the kernels take {channels * groups}")
    if out_channels % groups:
        raise ValueError(f"{out_channels} output channels cannot be split into {groups} groups")
    if routing_weights.shape != (x.shape[0], num_experts):
        raise ValueError(
            f"routing_weights must be (B, E) = {(x.shape[0], num_experts)}, "
            f"got {tuple(routing_weights.shape)}"
        )
    if bias is not None and bias.shape != (num_experts, out_channels):
        raise ValueError(
            f"bias must be (E, O) = {(num_experts, out_channels)}, got {tuple(bias.shape)}"
        )
