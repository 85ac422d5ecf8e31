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
MIN_LOOP_SIZE = 256  # output positions from which a convolution an example pays,
MAX_GROUPED_BYTES = 32 * 2**20  # where the mixed kernels of the batch take more than this
MIXED_BYTES = 8 * 2**20  # mixed kernels at a time
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


def disable_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Compute in the tensors' own precision, on devices without autocast (meta) too."""
    if torch.amp.is_autocast_available(device_type):
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
            "matmul": matrix products on the input's patches. The backward pass mixes the kernels
            again instead of keeping B of them. No forward-mode differentiation (`torch.func.jvp`),
            which the others have.
            "grouped": one convolution in which each example is a group; exports fix the batch.
            "loop": one convolution an example; exports fix the batch.

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
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(
        device_type
    )
    if autocast and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: convert one of them")
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
                convolve = _grouped if strategy == "grouped" else _loop
                y = convolve(x, weight, routing_weights, stride, symmetric, dilation, groups)
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
    if x.device.type == "cpu" and num_patches >= MIN_LOOP_SIZE and num_bytes > MAX_GROUPED_BYTES:
        return "loop"
    return "grouped"


def _mix(weight: Tensor, routing_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (E, O, ...), routing_weights (B, E) -> the kernel of each example (B, O, ...)."""
    return (routing_weights @ weight.flatten(1)).to(dtype).unflatten(1, weight.shape[1:])


def _grouped(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    batch = x.shape[0]
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        _mix(weight, routing_weights, x.dtype).flatten(0, 1),
        None,
        stride,
        padding,
        dilation,
        batch * groups,
    )
    return y.view(batch, -1, *y.shape[2:])


def _loop(
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    # Few examples at a time, so that their kernels stay in the cache.
    num_bytes = weight[0].numel() * weight.element_size()
    kernels = (
        kernel
        for weights in routing_weights.split(max(MIXED_BYTES // num_bytes, 1))
        for kernel in _mix(weight, weights, x.dtype)
    )
    return torch.cat(
        [
            F.conv2d(example, kernel, None, stride, padding, dilation, groups)
            for example, kernel in zip(x.split(1), kernels, strict=True)
        ]
    )


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
    y = _MixedMatmul.apply(patches, weight.flatten(2), routing_weights, groups)
    assert isinstance(y, Tensor)
    return y


class _MixedMatmul(torch.autograd.Function):
    """patches (B, G * K, L), weight (E, O, K), routing_weights (B, E), G -> (B, O, L).

    The backward pass mixes the kernels again instead of keeping them. Both passes mix those of
    some output channels at a time, so that they stay in the cache. Every step is differentiable:
    gradients of gradients come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(patches: Tensor, weight: Tensor, routing_weights: Tensor, groups: int) -> Tensor:
        step = _channels_at_once(patches, weight, groups)
        as_rows = _are_rows(patches)
        patches = _split_groups(patches, groups)
        outputs = []
        for block in weight.split(step, dim=1):
            kernels = _split_groups(_mix(block, routing_weights, patches.dtype), groups)
            outputs.append(_join_groups(_multiply(kernels, patches, as_rows), groups))
        if len(outputs) == 1:
            return outputs[0]
        if as_rows:
            return torch.cat([output.mT for output in outputs], dim=2).mT
        return torch.cat(outputs, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.groups = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        patches, weight, routing_weights = ctx.saved_tensors
        needs_patches, needs_weight, needs_routing, _ = ctx.needs_input_grad
        groups = ctx.groups
        step = _channels_at_once(patches, weight, groups)
        as_rows = _are_rows(patches)
        patches = _split_groups(patches, groups)
        grad_patches = grad_routing = None
        grad_blocks = []
        with disable_autocast(patches.device.type):
            for block, grad_y in zip(
                weight.split(step, dim=1), grad_outputs[0].split(step, dim=1), strict=True
            ):
                grad_y = _split_groups(grad_y, groups)
                if needs_patches:
                    kernels = _split_groups(_mix(block, routing_weights, patches.dtype), groups)
                    grad_patches = _multiply(kernels.mT, grad_y, as_rows, grad_patches)
                if needs_weight or needs_routing:
                    grad_kernels = _join_groups(torch.bmm(grad_y, patches.mT), groups)
                    grad_kernels = grad_kernels.flatten(1).to(weight.dtype)
                    if needs_weight:
                        grad_block = routing_weights.t() @ grad_kernels
                        grad_blocks.append(grad_block.view_as(block))
                    if needs_routing:
                        term = grad_kernels @ block.flatten(1).t()
                        grad_routing = term if grad_routing is None else grad_routing + term
        return (
            None if grad_patches is None else _join_groups(grad_patches, groups),
            torch.cat(grad_blocks, dim=1) if grad_blocks else None,
            grad_routing,
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


def _channels_at_once(patches: Tensor, weight: Tensor, groups: int) -> int:
    """Output channels whose mixed kernels fit the cache: a static function of the shapes.

    Kernels that take less than the patches would have these read more often than they save.
    """
    channels = weight.shape[1]
    # A compiler gets one product: its graph neither grows nor depends on the batch.
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or groups > 1:
        return channels
    num_bytes = patches.shape[0] * weight[0].numel() * weight.element_size()
    fitting_bytes = max(MIXED_BYTES, patches.numel() * patches.element_size())
    num_blocks = min(-(-num_bytes // fitting_bytes), channels // MIN_CHANNELS)
    return -(-channels // max(num_blocks, 1))


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
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[3 + i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    )
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
