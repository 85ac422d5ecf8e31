"""How a CondConv is executed: the strategies, the choice among them, and their derivatives.

Shapes: B batch, E experts, C input channels, O output channels, G groups, K = C / G * kh * kw the
elements of one output channel's kernel, L = H' * W' output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from condconv.autocast import disable_autocast
from condconv.geometry import Geometry, output_size

Strategy = Literal["matmul", "grouped", "loop"]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# Measured on a CPU (float32, 8 experts).
# Output positions L for each of O output channels up to which gathering the patches of a k x k
# kernel pays: that copies L * K elements of an example, mixing writes O * K.
MAX_POSITIONS_PER_CHANNEL = 1 / 4
MAX_ROWS = 64  # output positions up to which products of rows pay: more are not worth a copy
MAX_GROUPED_BYTES = 32 * 2**20  # of the batch's mixed kernels, up to which one convolution pays
MIN_LOOPED_BYTES = 2**18  # of an example's input, from which a copy of it costs more than a call
MIXED_BYTES = 8 * 2**20  # of mixed kernels held at a time
MAX_EXAMPLES = 8  # mixed for at a time: with more, the stores of the mixing collide in the cache
MIN_SHARED = 2**17  # elements of one example's kernel from which threads share out the mixing
MIN_CHANNELS = 64  # smaller blocks make slow matrix products


def is_channels_last(x: Tensor) -> bool:
    # By strides, as asking for the format is an error inside of `vmap`.
    return x.stride(1) == 1 and not x.is_contiguous()


def lay_out(x: Tensor, channels_last: bool) -> Tensor:
    """x in that memory format; the same tensor where it is."""
    if channels_last:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.contiguous()


def choose_strategy(x: Tensor, weight: Tensor, geometry: Geometry) -> Strategy:
    """The strategy that measures fastest on a CPU for the shapes; elsewhere it was not measured."""
    if x.shape[0] <= 1:
        return "grouped"
    is_pointwise = weight.shape[3:] == (1, 1)
    # Products take less time than many groups, but for kernels of one element.
    if geometry.groups > 1 and not (is_pointwise and weight.shape[2] > 1):
        # Examples side by side are channels first: the input would be copied, and the output back.
        in_turn = (
            is_channels_last(x) and x.is_cpu and x[0].numel() * x.element_size() >= MIN_LOOPED_BYTES
        )
        return "loop" if in_turn else "grouped"
    num_positions = math.prod(output_size(x, weight, geometry))
    if is_pointwise or num_positions <= MAX_POSITIONS_PER_CHANNEL * weight.shape[1]:
        return "matmul"
    num_bytes = x.shape[0] * weight[0].numel() * weight.element_size()
    if x.is_cpu and num_bytes > MAX_GROUPED_BYTES:
        return "loop"
    return "grouped"


def mix(
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


def _keeps_kernels(x: Tensor, weight: Tensor, geometry: Geometry, strategy: Strategy) -> bool:
    """Whether to keep mixed kernels for the backward pass, or to mix them again.

    Where they take less than the input or the experts, which are there in any case, mixing again
    saves little memory; and on one position none are mixed.
    """
    if strategy == "matmul":
        return geometry.groups == 1 and output_size(x, weight, geometry) == (1, 1)
    if strategy == "loop":
        return False
    batch, num_experts = x.shape[0], weight.shape[0]
    return batch <= num_experts or batch * weight.numel() <= num_experts * x.numel()


def execute(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry, strategy: Strategy
) -> Tensor:
    """`run_forward`, and where gradients are asked for, a backward pass that keeps few kernels."""
    inputs = (x, weight, routing_weights)
    if _keeps_kernels(x, weight, geometry, strategy) or not _need_gradients(*inputs):
        return run_forward(*inputs, geometry, strategy)
    y = _Mixed.apply(*inputs, geometry, strategy)
    assert isinstance(y, Tensor)
    return y


def run_forward(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry, strategy: Strategy
) -> Tensor:
    """(B, O, H', W'), without the bias."""
    if strategy == "matmul" or x.shape[0] == 0:
        patches = gather_patches(x, weight, geometry)
        y = _matmul(patches, weight.flatten(2), routing_weights, geometry.groups)
        return y.unflatten(2, output_size(x, weight, geometry))
    if strategy == "grouped":
        return _convolve(x, weight, routing_weights, geometry)
    return _convolve_in_turn(x, weight, routing_weights, geometry)


def run_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    geometry: Geometry,
    strategy: Strategy,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients by x, weight and routing_weights, where needed."""
    if strategy == "matmul" or x.shape[0] == 0:
        patches = gather_patches(x, weight, geometry)
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


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep for the backward pass what is there in any case, and no mixed kernels."""
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


class _Mixed(torch.autograd.Function):
    """The operation, with a backward pass that mixes the kernels again instead of keeping them.

    Every step is differentiable: gradients of gradients come out right.
    """

    generate_vmap_rule = True

    forward = staticmethod(run_forward)
    setup_context = staticmethod(save_inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, routing_weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with disable_autocast(x):
            grads = run_backward(
                grad_outputs[0], x, weight, routing_weights, *ctx.options, needs=needs
            )
        return *grads, None, None


def _convolve(x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry) -> Tensor:
    """All examples are the groups of one convolution."""
    batch = x.shape[0]
    stride, padding, dilation, groups = geometry
    kernels = mix(weight, routing_weights, x.dtype, weight.shape[2:])
    y = F.conv2d(_join_examples(x), kernels, None, stride, padding, dilation, batch * groups)
    return y if batch == 1 else y.view(batch, -1, *y.shape[2:])


def _convolve_in_turn(
    x: Tensor, weight: Tensor, routing_weights: Tensor, geometry: Geometry
) -> Tensor:
    y = None
    for examples in _slices(x.shape[0], MAX_EXAMPLES):
        kernels = mix(weight, routing_weights[examples], x.dtype, weight.shape[1:])
        for i, kernel in enumerate(kernels, examples.start):
            y = _put(F.conv2d(x[i : i + 1], kernel, None, *geometry), y, i, x.shape[0])
    assert y is not None
    return y


def _differentiate_convolution(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    routing_weights: Tensor,
    geometry: Geometry,
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
        kernels = mix(weight, weights, x.dtype, weight.shape[1:])
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
    if piece.dim() == 4 and is_channels_last(piece):
        _, channels, height, width = piece.shape
        return piece.new_empty(size, height, width, channels).permute(0, 3, 1, 2)
    return piece.new_empty(size, *piece.shape[1:])


def _contract(a: Tensor, b: Tensor) -> Tensor:
    """a (B, n), b (E, n) -> a b^T (B, E), in parts: few long rows would be one thread's."""
    num_parts = math.gcd(a.shape[1], 64)
    a, b = (tensor.unflatten(1, (num_parts, -1)).transpose(0, 1) for tensor in (a, b))
    return torch.bmm(a, b.mT).sum(0)


def gather_patches(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """x (B, C, H, W) -> (B, G * K, L)."""
    stride, padding, dilation, _ = geometry
    kernel_size = (weight.shape[3], weight.shape[4])
    if kernel_size == (1, 1) and padding == (0, 0):
        return (x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]).flatten(2)
    return F.unfold(x, kernel_size, dilation, padding, stride)


def _scatter_patches(patches: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of `gather_patches`: (B, G * K, L) -> (B, C, H, W)."""
    stride, padding, dilation, _ = geometry
    kernel_size = (weight.shape[3], weight.shape[4])
    if kernel_size == stride == (1, 1) and padding == (0, 0):
        return patches.view_as(x)
    return F.fold(patches, x.shape[2:], kernel_size, dilation, padding, stride)


def _matmul(patches: Tensor, weight: Tensor, routing_weights: Tensor, groups: int) -> Tensor:
    """patches (B, G * K, L), weight (E, O, K), routing_weights (B, E), G -> (B, O, L)."""
    if patches.shape[2] == groups == 1:
        # Of every expert, the one output takes no more products than the kernel's mixing.
        outputs = F.linear(patches[:, :, 0].to(weight.dtype), weight.flatten(0, 1))
        y = torch.bmm(routing_weights[:, None], outputs.unflatten(1, weight.shape[:2]))
        return y.to(patches.dtype).mT
    as_rows = _are_rows(patches)
    if _works_in_parts(patches, weight, routing_weights, groups=groups):
        y = _new_empty(patches, weight.shape[1], as_rows)
        for examples, channels, buffer in _parts(patches, weight):
            kernels = _mix_into(buffer, weight[:, channels], routing_weights[examples])
            _multiply(kernels, patches[examples], as_rows, y[examples, channels])
        return y
    kernels = split_groups(mix(weight, routing_weights, patches.dtype, weight.shape[1:]), groups)
    return join_groups(_multiply(kernels, split_groups(patches, groups), as_rows), groups)


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
    grad_y = split_groups(grad_y, groups)
    if needs[0]:
        kernels = mix(weight, routing_weights, patches.dtype, weight.shape[1:])
        kernels = split_groups(kernels, groups)
        grad_patches = join_groups(_multiply(kernels.mT, grad_y, _are_rows(patches)), groups)
    if needs[1] or needs[2]:
        grad_kernels = torch.bmm(grad_y, split_groups(patches, groups).mT)
        grad_kernels = join_groups(grad_kernels, groups).flatten(1).to(weight.dtype)
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
        and tensors[0].is_cpu
        and not _need_gradients(*tensors)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
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
    """`mix` written to kernels (B, O, K)."""
    if kernels.dtype == weight.dtype:
        torch.mm(routing_weights, weight.flatten(1), out=kernels.flatten(1))
    else:
        kernels.flatten(1).copy_(torch.mm(routing_weights, weight.flatten(1)))
    return kernels


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
    # Not `empty_like`: blocks of it must be views, whatever the layout of the experts.
    grad_weight = weight.new_empty(weight.shape) if needs_weight else None
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


def split_groups(tensor: Tensor, groups: int) -> Tensor:
    """(B, G * n, m) -> (B * G, n, m)."""
    return tensor if groups == 1 else tensor.unflatten(1, (groups, -1)).flatten(0, 1)


def join_groups(tensor: Tensor, groups: int) -> Tensor:
    """(B * G, n, m) -> (B, G * n, m)."""
    return tensor if groups == 1 else tensor.unflatten(0, (-1, groups)).flatten(1, 2)
