"""The CondConv operation: y = (a_1 W_1 + ... + a_E W_E) * x, with weights a of each example.

Shapes: B batch, E experts, C input channels, O output channels, G groups, K = C / G * kh * kw the
elements of one output channel's kernel, L = H' * W' output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = int | tuple[int, int] | Literal["same", "valid"]
Strategy = Literal["matmul", "grouped", "loop"]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# Measured on a CPU (float32, 8 experts).
MAX_PATCHES = 128  # output positions up to which gathering the patches of a k x k kernel pays
MAX_ROWS = 64  # output positions up to which products of rows pay: more are not worth a copy
MAX_GROUPED_BYTES = 32 * 2**20  # of the batch's mixed kernels, up to which one convolution pays
MIN_LOOPED_BYTES = 2**18  # of an example's input, from which a copy of it costs more than a call
MIXED_BYTES = 8 * 2**20  # mixed kernels at a time,
MAX_EXAMPLES = 8  # of this many examples: with more, the stores of the mixing collide in the cache
MIN_SHARED = 2**17  # elements of one example's kernel from which threads share out the mixing
MIN_CHANNELS = 64  # smaller blocks make slow matrix products


class _Geometry(NamedTuple):
    """How a kernel is applied; the padding is of both sides. The order is that of `F.conv2d`."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


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
    channels_last = _is_channels_last(x)
    with disable_autocast(device_type):
        if weight.shape[0] == 1 and strategy is None:
            # One expert: scaling the output is scaling the kernel.
            x, geometry, _ = _resolve(x, weight, stride, padding, dilation, groups, strategy)
            y = F.conv2d(x, weight[0].to(x.dtype), None, *geometry)
            y = y * routing_weights.to(x.dtype)[:, :, None, None]
        elif torch.compiler.is_exporting():
            x, geometry, _ = _resolve(x, weight, stride, padding, dilation, groups, strategy)
            y = torch.ops.condconv.exported(x, weight, routing_weights, None, *geometry)
        elif torch.compiler.is_compiling():
            same = padding == "same"
            pads = (0, 0) if same else pad_input(x, (1, 1), stride, padding, dilation)[1]
            y = _operator(
                x, weight, routing_weights, stride, pads, dilation, groups, same, strategy
            )
        else:
            x, geometry, strategy = _resolve(x, weight, stride, padding, dilation, groups, strategy)
            y = _execute(x, weight, routing_weights, geometry, strategy)
        if bias is not None:
            y = y + (routing_weights @ bias.to(weight.dtype)).to(y.dtype)[:, :, None, None]
    return _lay_out(y, channels_last)


def _is_channels_last(x: Tensor) -> bool:
    # By strides, as asking for the format is an error inside of `vmap`.
    return x.stride(1) == 1 and not x.is_contiguous()


def _lay_out(x: Tensor, channels_last: bool) -> Tensor:
    """x in that memory format; the same tensor where it is."""
    if channels_last:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.contiguous()


def _resolve(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    groups: int,
    strategy: Strategy | None,
) -> tuple[Tensor, _Geometry, Strategy]:
    """The input with what a convolution cannot pad itself, and what is then left to know."""
    x, pads = pad_input(x, (weight.shape[3], weight.shape[4]), stride, padding, dilation)
    geometry = _Geometry(stride, pads, dilation, groups)
    output_size = _output_size(x, weight, geometry)
    return x, geometry, strategy or choose_strategy(x, weight, output_size, groups)


def choose_strategy(
    x: Tensor, weight: Tensor, output_size: tuple[int, int], groups: int
) -> Strategy:
    """The strategy that measures fastest for the shapes."""
    if x.shape[0] <= 1:
        return "grouped"
    if groups > 1:
        # Examples side by side are channels first: the input would be copied, and the output back.
        in_turn = (
            x.device.type == "cpu"
            and _is_channels_last(x)
            and x[0].numel() * x.element_size() >= MIN_LOOPED_BYTES
        )
        return "loop" if in_turn else "grouped"
    num_patches = output_size[0] * output_size[1]
    if weight.shape[3:] == (1, 1) or num_patches <= MAX_PATCHES:
        return "matmul"
    num_bytes = x.shape[0] * weight[0].numel() * weight.element_size()
    if x.device.type == "cpu" and num_bytes > MAX_GROUPED_BYTES:
        return "loop"
    return "grouped"


def _mix(
    weight: Tensor, routing_weights: Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    """weight (E, O, ...), routing_weights (B, E) -> the kernels of all examples (-1, *shape)."""
    experts = weight.flatten(1)
    if (
        routing_weights.shape[0] == 1
        and experts.shape[1] >= MIN_SHARED
        and not _need_gradients(routing_weights, weight)
    ):
        # In parts, as a product with a single row takes a single thread. Their derivative would
        # need memory for a second copy.
        num_parts = math.gcd(experts.shape[1], 8)
        parts = experts.unflatten(1, (num_parts, -1)).transpose(0, 1)
        kernels = torch.bmm(routing_weights.expand(num_parts, -1, -1), parts)
    else:
        kernels = torch.mm(routing_weights, experts)
    # Asking for what is there already costs as much as some small layers' arithmetic, here and
    # below.
    if kernels.dtype != dtype:
        kernels = kernels.to(dtype)
    return kernels.view(-1, *shape)


def _need_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _keeps_kernels(x: Tensor, weight: Tensor, strategy: Strategy) -> bool:
    """Whether to keep mixed kernels for the backward pass, or to mix them again.

    Where they take less than the input or the experts, which are there in any case, mixing again
    saves little memory.
    """
    if strategy != "grouped":
        return False
    batch, num_experts = x.shape[0], weight.shape[0]
    return batch <= num_experts or batch * weight.numel() <= num_experts * x.numel()


def _execute(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: _Geometry, strategy: Strategy
) -> Tensor:
    inputs = (x, weight, routing_weights)
    if _need_gradients(*inputs) and not _keeps_kernels(x, weight, strategy):
        y = _Mixed.apply(*inputs, geometry, strategy)
        assert isinstance(y, Tensor)
        return y
    return _Mixed.forward(*inputs, geometry, strategy)


class _Mixed(torch.autograd.Function):
    """The operation, with a backward pass that mixes the kernels again instead of keeping them.

    Every step is differentiable: gradients of gradients come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        routing_weights: Tensor,
        geometry: _Geometry,
        strategy: Strategy,
    ) -> Tensor:
        if strategy == "matmul" or x.shape[0] == 0:
            patches = _gather_patches(x, weight, geometry)
            y = _matmul(patches, weight.flatten(2), routing_weights, geometry.groups)
            return y.unflatten(2, _output_size(x, weight, geometry))
        if strategy == "grouped":
            return _convolve(x, weight, routing_weights, geometry)
        return _convolve_in_turn(x, weight, routing_weights, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, routing_weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with disable_autocast(x.device.type):
            grads = _differentiate(
                grad_outputs[0], x, weight, routing_weights, *ctx.options, needs=needs
            )
        return *grads, None, None


def _differentiate(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    geometry: _Geometry,
    strategy: Strategy,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients by x, weight and routing_weights, where needed."""
    if strategy == "matmul" or x.shape[0] == 0:
        patches = _gather_patches(x, weight, geometry)
        grad_patches, grad_weight, grad_routing = _differentiate_matmul(
            grad_y.flatten(2), patches, weight.flatten(2), routing_weights, geometry.groups, needs
        )
        return (
            None if grad_patches is None else _scatter_patches(grad_patches, x, weight, geometry),
            None if grad_weight is None else grad_weight.view_as(weight),
            grad_routing,
        )
    at_once = x.shape[0] if strategy == "grouped" else 1
    return _differentiate_convolution(grad_y, x, weight, routing_weights, geometry, at_once, needs)


def _convolve(x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: _Geometry) -> Tensor:
    """All examples are the groups of one convolution."""
    batch = x.shape[0]
    stride, padding, dilation, groups = geometry
    kernels = _mix(weight, routing_weights, x.dtype, weight.shape[2:])
    y = F.conv2d(_join_examples(x), kernels, None, stride, padding, dilation, batch * groups)
    return y if batch == 1 else y.view(batch, -1, *y.shape[2:])


def _convolve_in_turn(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: _Geometry
) -> Tensor:
    y = None
    for examples in _slices(x.shape[0], MAX_EXAMPLES):
        kernels = _mix(weight, routing_weights[examples], x.dtype, weight.shape[1:])
        for i, kernel in enumerate(kernels, examples.start):
            y = _put(F.conv2d(x[i : i + 1], kernel, None, *geometry), y, i, x.shape[0])
    assert y is not None
    return y


def _differentiate_convolution(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    geometry: _Geometry,
    at_once: int,
    needs: Sequence[bool],
) -> Gradients:
    """`at_once` examples are the groups of one convolution."""
    *options, groups = geometry
    needs_x, needs_weight, needs_routing = needs
    needs_kernels = needs_weight or needs_routing
    grad_x = grad_weight = grad_routing = None
    batch = x.shape[0]
    for examples in _slices(batch, max(at_once, MAX_EXAMPLES)):
        weights = routing_weights[examples]
        kernels = _mix(weight, weights, x.dtype, weight.shape[1:])
        grad_kernels = None
        for part in _slices(kernels.shape[0], at_once):
            first = examples.start + part.start
            inputs = x[first : first + at_once]
            num = inputs.shape[0]
            grad_inputs, grad, _ = torch.ops.aten.convolution_backward(
                _join_examples(grad_y[first : first + at_once]),
                _join_examples(inputs),
                kernels[part].flatten(0, 1),
                None,
                *options,
                False,
                (0, 0),
                num * groups,
                (needs_x, needs_kernels, False),
            )
            if needs_x:
                grad_x = _put(grad_inputs.reshape(inputs.shape), grad_x, first, batch)
            if needs_kernels:
                grad = grad.reshape(num, -1)
                grad_kernels = _put(grad, grad_kernels, part.start, kernels.shape[0])
        if grad_kernels is not None:
            grad_kernels = grad_kernels.to(weight.dtype)
            if needs_weight:
                term = weights.t() @ grad_kernels
                grad_weight = term if grad_weight is None else grad_weight + term
            if needs_routing:
                term = _contract(grad_kernels, weight.flatten(1))
                grad_routing = _put(term, grad_routing, examples.start, batch)
    return grad_x, None if grad_weight is None else grad_weight.view_as(weight), grad_routing


def _join_examples(tensor: Tensor) -> Tensor:
    """(n, C, H, W) -> (1, n * C, H, W)."""
    return tensor if tensor.shape[0] == 1 else tensor.reshape(1, -1, *tensor.shape[2:])


def _slices(size: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _put(piece: Tensor, whole: Tensor | None, first: int, size: int) -> Tensor:
    """Write rows from `first` on into a tensor of `size` rows, made where there is none yet; a
    piece that has all rows is that tensor."""
    if piece.shape[0] == size:
        return piece
    if whole is None:
        whole = _new_empty_like(piece, size)
    whole[first : first + piece.shape[0]] = piece
    return whole


def _new_empty_like(piece: Tensor, size: int) -> Tensor:
    """A tensor of `size` rows in the memory format of the piece."""
    if piece.dim() == 4 and _is_channels_last(piece):
        _, channels, height, width = piece.shape
        return piece.new_empty(size, height, width, channels).permute(0, 3, 1, 2)
    return piece.new_empty(size, *piece.shape[1:])


def _contract(a: Tensor, b: Tensor) -> Tensor:
    """a (B, n), b (E, n) -> a b^T (B, E), summed in parts: few long rows use one thread else."""
    num_parts = math.gcd(a.shape[1], 64)
    a, b = (tensor.unflatten(1, (num_parts, -1)).transpose(0, 1) for tensor in (a, b))
    return torch.bmm(a, b.mT).sum(0)


def _gather_patches(x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """x (B, C, H, W) -> (B, G * K, L)."""
    stride, padding, dilation, _ = geometry
    kernel_size = (weight.shape[3], weight.shape[4])
    if kernel_size == (1, 1) and padding == (0, 0):
        return x[:, :, :: stride[0], :: stride[1]].flatten(2)
    return F.unfold(x, kernel_size, dilation, padding, stride)


def _scatter_patches(patches: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """The transpose of `_gather_patches`: (B, G * K, L) -> (B, C, H, W)."""
    stride, padding, dilation, _ = geometry
    kernel_size = (weight.shape[3], weight.shape[4])
    if kernel_size == stride == (1, 1) and padding == (0, 0):
        return patches.view_as(x)
    return F.fold(patches, x.shape[2:], kernel_size, dilation, padding, stride)


def _matmul(patches: Tensor, weight: Tensor, routing_weights: Tensor, groups: int) -> Tensor:
    """patches (B, G * K, L), weight (E, O, K), routing_weights (B, E), G -> (B, O, L)."""
    as_rows = _are_rows(patches)
    if _works_in_parts(patches, weight, routing_weights, groups=groups):
        y = _new_empty(patches, weight.shape[1], as_rows)
        for examples, channels, buffer in _parts(patches, weight):
            kernels = _mix_into(buffer, weight[:, channels], routing_weights[examples])
            _multiply(kernels, patches[examples], as_rows, y[examples, channels])
        return y
    kernels = _split_groups(_mix(weight, routing_weights, patches.dtype, weight.shape[1:]), groups)
    return _join_groups(_multiply(kernels, _split_groups(patches, groups), as_rows), groups)


def _differentiate_matmul(
    grad_y: Tensor,
    patches: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    groups: int,
    needs: Sequence[bool],
) -> Gradients:
    if _works_in_parts(grad_y, patches, weight, routing_weights, groups=groups):
        return _differentiate_matmul_in_parts(grad_y, patches, weight, routing_weights, needs)
    grad_patches = grad_weight = grad_routing = None
    grad_y = _split_groups(grad_y, groups)
    if needs[0]:
        kernels = _mix(weight, routing_weights, patches.dtype, weight.shape[1:])
        kernels = _split_groups(kernels, groups)
        grad_patches = _join_groups(_multiply(kernels.mT, grad_y, _are_rows(patches)), groups)
    if needs[1] or needs[2]:
        grad_kernels = torch.bmm(grad_y, _split_groups(patches, groups).mT)
        grad_kernels = _join_groups(grad_kernels, groups).flatten(1).to(weight.dtype)
        grad_weight = (routing_weights.t() @ grad_kernels).view_as(weight) if needs[1] else None
        grad_routing = _contract(grad_kernels, weight.flatten(1)) if needs[2] else None
    return grad_patches, grad_weight, grad_routing


def _works_in_parts(*tensors: Tensor, groups: int) -> bool:
    """Whether to mix the kernels of some examples and some output channels at a time.

    They stay in the cache of a CPU then. Results are written in place, which neither derivatives
    nor transforms (`vmap`) can follow.
    """
    return (
        groups == 1
        and tensors[0].shape[0] > 0
        and tensors[0].device.type == "cpu"
        and not _need_gradients(*tensors)
        and not torch._C._are_functorch_transforms_active()
    )


def _parts(patches: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(examples, output channels, room for their mixed kernels (b, o, K))."""
    num_examples, num_channels = _block_size(patches.shape[0], weight)
    buffer = patches.new_empty(num_examples * num_channels * weight.shape[2])
    for channels in _slices(weight.shape[1], num_channels):
        for examples in _slices(patches.shape[0], num_examples):
            shape = examples.stop - examples.start, channels.stop - channels.start, weight.shape[2]
            yield examples, channels, buffer[: math.prod(shape)].view(shape)


def _mix_into(kernels: Tensor, weight: Tensor, routing_weights: Tensor) -> Tensor:
    """`_mix` written to kernels (B, O, K)."""
    if kernels.dtype == weight.dtype:
        torch.mm(routing_weights, weight.flatten(1), out=kernels.flatten(1))
        return kernels
    return kernels.copy_(_mix(weight, routing_weights, kernels.dtype, kernels.shape[1:]))


def _differentiate_matmul_in_parts(
    grad_y: Tensor,
    patches: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    needs_patches, needs_weight, needs_routing = needs
    as_rows = _are_rows(patches)
    grad_patches = _new_empty(patches, patches.shape[1], as_rows) if needs_patches else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    grad_routing = torch.zeros_like(routing_weights) if needs_routing else None
    for examples, channels, buffer in _parts(patches, weight):
        grad, weights = grad_y[examples, channels], routing_weights[examples]
        block = weight[:, channels]
        if grad_patches is not None:
            kernels = _mix_into(buffer, block, weights)
            _multiply(kernels.mT, grad, as_rows, grad_patches[examples], add=channels.start > 0)
        if needs_weight or needs_routing:
            grad_kernels = torch.bmm(grad, patches[examples].mT, out=buffer)
            grad_kernels = grad_kernels.flatten(1).to(weight.dtype)
            if grad_weight is not None:
                total = grad_weight[:, channels].flatten(1)
                beta = int(examples.start > 0)
                torch.addmm(total, weights.t(), grad_kernels, beta=beta, out=total)
            if grad_routing is not None:
                grad_routing[examples] += _contract(grad_kernels, block.flatten(1))
    return grad_patches, grad_weight, grad_routing


def _are_rows(patches: Tensor) -> bool:
    """Whether to hold patches (B, K, L) and outputs as rows (B, L, K): a channels_last layout."""
    return patches.shape[2] <= MAX_ROWS or patches.stride(1) == 1


def _new_empty(patches: Tensor, channels: int, as_rows: bool) -> Tensor:
    """(B, channels, L)."""
    batch, _, positions = patches.shape
    if as_rows:
        return patches.new_empty(batch, positions, channels).mT
    return patches.new_empty(batch, channels, positions)


def _multiply(
    a: Tensor, b: Tensor, as_rows: bool, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """a @ b, laid out as columns or as rows; written (or added) to `out` where given."""
    if as_rows:
        return _multiply(b.mT, a.mT, False, None if out is None else out.mT, add).mT
    # Under these names the counters of operations know them, not under those of methods.
    if add:
        return torch.baddbmm(out, a, b, out=out)  # pyright: ignore[reportArgumentType]
    if out is None or out.is_contiguous():
        return torch.bmm(a, b, out=out)
    return out.copy_(torch.bmm(a, b))


def _block_size(batch: int, weight: Tensor) -> tuple[int, int]:
    """Examples and output channels to mix the kernels of at a time."""
    examples, channels = min(batch, MAX_EXAMPLES), weight.shape[1]
    num_bytes = examples * weight[0].numel() * weight.element_size()
    num_blocks = min(-(-num_bytes // MIXED_BYTES), channels // MIN_CHANNELS)
    return examples, -(-channels // max(num_blocks, 1))


def _split_groups(tensor: Tensor, groups: int) -> Tensor:
    """(B, G * n, m) -> (B * G, n, m)."""
    return tensor if groups == 1 else tensor.unflatten(1, (groups, -1)).flatten(0, 1)


def _join_groups(tensor: Tensor, groups: int) -> Tensor:
    """(B * G, n, m) -> (B, G * n, m)."""
    return tensor if groups == 1 else tensor.unflatten(0, (-1, groups)).flatten(1, 2)


def _output_size(x: Tensor, weight: Tensor, geometry: _Geometry) -> tuple[int, int]:
    stride, padding, dilation, _ = geometry
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
    geometry = _Geometry(pair(stride), pair(padding), pair(dilation), groups)
    kernel_size = weight.shape[3:]
    sizes = _output_size(x, weight, geometry)
    if kernel_size == (1, 1) and geometry.padding == (0, 0):
        patches = _gather_patches(x, weight, geometry)
    else:
        # `unfold` becomes gathers by index tables, which take longer than all the rest.
        rows, columns = (
            [slice(i * gap, i * gap + (size - 1) * step + 1, step) for i in range(length)]
            for length, size, step, gap in zip(kernel_size, sizes, stride, dilation, strict=True)
        )
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        patches = [x[:, :, row, column] for row in rows for column in columns]
        patches = torch.stack(patches, dim=2).flatten(1, 2).flatten(2)
    kernels = _mix(weight, routing_weights, x.dtype, weight.flatten(2).shape[1:])
    y = torch.bmm(_split_groups(kernels, groups), _split_groups(patches, groups))
    y = _join_groups(y, groups).unflatten(2, sizes)
    return y if bias is None else y + bias[:, None, None]


# One that is implicitly made of others: exporters that do not know it decompose it.
torch.library.define(
    "condconv::exported",
    "(Tensor x, Tensor weight, Tensor routing_weights, Tensor? bias, int[] stride, "
    "SymInt[] padding, int[] dilation, int groups) -> Tensor",
)
torch.library.impl("condconv::exported", "CompositeImplicitAutograd", _export)


@torch.library.custom_op("condconv::condconv2d", mutates_args=())
def _operator(
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
    channels_last = _is_channels_last(x)
    x, geometry, choice = _unpack(x, weight, stride, padding, dilation, groups, same, strategy)
    return _lay_out(_Mixed.forward(x, weight, routing_weights, geometry, choice), channels_last)


@_operator.register_fake
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
        geometry = _Geometry(pair(stride), pair(padding), pair(dilation), groups)
        size = _output_size(x, weight, geometry)
    return _lay_out(x.new_empty(x.shape[0], weight.shape[1], *size), _is_channels_last(x))


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
    grad_x, *grads = _differentiate(
        grad_y, padded, weight, routing_weights, geometry, choice, needs
    )
    if grad_x is not None:
        (height, width), (padded_height, padded_width) = x.shape[2:], padded.shape[2:]
        top, left = (padded_height - height) // 2, (padded_width - width) // 2
        grad_x = grad_x[:, :, top : top + height, left : left + width]
        grad_x = _lay_out(grad_x, _is_channels_last(x))
    others = [grad.contiguous() for grad in grads if grad is not None]
    return others if grad_x is None else [grad_x, *others]


@_operator_backward.register_fake
def _(grad_y: Tensor, *inputs: Any) -> list[Tensor]:
    x, *others = inputs[:3]
    needs_x, *needs = inputs[-1]
    grads = [
        tensor.new_empty(tensor.shape) for tensor, need in zip(others, needs, strict=True) if need
    ]
    return [_lay_out(x.new_empty(x.shape), _is_channels_last(x)), *grads] if needs_x else grads


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = iter(_operator_backward(grad_y, *ctx.saved_tensors, *ctx.options, needs))
    return *(next(grads) if need else None for need in needs), *[None] * 6


_operator.register_autograd(_backward, setup_context=_save_inputs)


def _unpack(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    same: bool,
    strategy: Any,
) -> tuple[Tensor, _Geometry, Strategy]:
    """`_resolve` of an operator's arguments, which know fewer types."""
    pads = "same" if same else pair(padding)
    return _resolve(x, weight, pair(stride), pads, pair(dilation), groups, strategy)


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
