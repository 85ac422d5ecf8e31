"""Make a network conditional: `nn.Conv2d` to CondConv, timm's CondConv to ours.

Shapes: B batch, E experts, C input channels, O output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from condconv.geometry import Padding, pair
from condconv.layers import (
    CondConv2d,
    Conv2dSame,
    RoutedCondConv2d,
    Router,
    check_num_experts,
)
from condconv.shared_routing import find_blocks, has_hooks, pick, share_routing


def convert_to_condconv(
    module: nn.Module,
    num_experts: int,
    *,
    where: Callable[[str, nn.Conv2d], bool] | None = None,
    share_within: Callable[[str, nn.Module], bool] | None = None,
    delta: float = 0.2,
    from_scratch: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Make convolutions of a network conditional, in place; its function stays the same.

    Each becomes a `RoutedCondConv2d`, or a `CondConv2d` inside of a block that `share_within`
    picks, which becomes a `SharedRouting`. Experts and routers start as in `spread_over_experts`.
    Names stay; kernels and biases gain the axis of experts. What is new has the dtype and the
    device of the static kernel, and is trainable where that is. Create optimizers afterwards: the
    parameters are new.

    Args:
        module: a network, or a single convolution.
        num_experts: 1 changes nothing.
        where: which convolutions, by name and module; None takes all, the first and those of
            squeeze-and-excitation too. One that is registered under several names is asked about
            once, and stays one.
        share_within: which modules have one routing for all of theirs, by name and module; None
            gives every convolution its own.
        delta: as in `spread_over_experts`.
        from_scratch: for a network before its training; the function changes. Each expert is the
            static kernel with its elements in another order, which keeps the distribution that
            they were drawn from, and routers start as `Router` does.
        generator: of the experts; None takes the default one.

    Returns:
        `module`, or the layer in its place where it is a convolution.

    Raises:
        ValueError: for an argument out of range, where nothing is picked, or naming what cannot be
            converted. Nothing has changed then.
    """
    check_num_experts(num_experts)
    _check_delta(delta)
    convolutions = {
        child: name
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d) and (where is None or where(name, child))
    }
    if not convolutions:
        raise ValueError("there is no nn.Conv2d" + (" that `where` picks" if where else ""))
    _check_convolutions(convolutions)
    if num_experts == 1:
        return module
    blocks = find_blocks(module, convolutions, share_within) if share_within else {}

    def start(layer: nn.Module, static: Mapping[str, Tensor], like: Tensor) -> None:
        layer.to(like.device, like.dtype)
        if from_scratch:
            state = {
                key: _shuffle(tensor, num_experts, generator) for key, tensor in static.items()
            }
        else:
            state = spread_over_experts(static, layer, delta=delta, generator=generator)
        layer.load_state_dict(state, strict=not from_scratch)

    shared = {child for block in blocks for child in block.modules()}
    layers = {}
    for convolution in convolutions:
        layer = (CondConv2d if convolution in shared else RoutedCondConv2d)(
            convolution.in_channels,
            convolution.out_channels,
            pair(convolution.kernel_size),
            pair(convolution.stride),
            _padding(convolution),
            pair(convolution.dilation),
            convolution.groups,
            convolution.bias is not None,
            num_experts=num_experts,
        )
        start(layer, convolution.state_dict(), convolution.weight)
        layer.requires_grad_(convolution.weight.requires_grad)
        if layer.bias is not None and convolution.bias is not None:
            layer.bias.requires_grad_(convolution.bias.requires_grad)
        layers[convolution] = layer.train(convolution.training)

    for block, in_channels in blocks.items():
        kernels = [child.weight for child in pick(block, convolutions)]
        router = Router(in_channels, num_experts)
        start(router, {}, kernels[0])
        block.router = router.requires_grad_(any(kernel.requires_grad for kernel in kernels))
    module = replace_modules(module, layers)
    for block in blocks:
        share_routing(block)
    return module


def spread_over_experts(
    state: Mapping[str, Tensor],
    network: nn.Module,
    *,
    delta: float = 0.2,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The state dict of a conditional network that computes what a static one does.

    Each of E experts is W / sqrt(E) plus a random difference, and the differences of all experts
    sum to zero. Every router starts at weight 0 and bias -ln(sqrt(E) - 1), so that each routing
    weight is 1 / sqrt(E) and the mixture is W. Their squares sum to 1: the mixture learns at the
    speed of W. With equal routing all experts get the same gradient, and only their differences
    let the routers learn.

    Args:
        state: the state dict of the static network of the same form.
        network: the conditional network; a static one gets the state as it is.
        delta: size of the differences relative to W / sqrt(E), per output channel; 0.1 to 0.5.
            Where all of W is 0, relative to a W of the size 1 / sqrt(fan in).
        generator: of the differences; None takes the default one.

    Raises:
        ValueError: where `delta` is out of range.
    """
    _check_delta(delta)
    spread = dict(state)
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, CondConv2d):
            for key in (f"{prefix}weight", f"{prefix}bias"):
                if key in state:
                    spread[key] = _spread(state[key], module.num_experts, delta, generator)
        elif isinstance(module, Router):
            num_experts = module.linear.out_features
            spread[f"{prefix}linear.weight"] = torch.zeros_like(module.linear.weight)
            spread[f"{prefix}linear.bias"] = torch.full_like(
                module.linear.bias, -math.log(math.sqrt(num_experts) - 1)
            )
    return spread


def accelerate_timm(network: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """Put ours in the place of timm's `CondConv2d` layers, in place; outputs and training stay.

    The layers take over the very parameters: optimizers go on with them, and state dicts fit both
    ways, in names and in shapes (see `FlatCondConv2d`).

    Args:
        channels_last: also lay the network out in this memory format, in which depthwise layers
            take less time. timm's layers undo it, ours keep it.

    Returns:
        `network`, or the layer in its place where it is such a layer.

    Raises:
        ValueError: where there is none, or naming one that has hooks. Nothing has changed then.
    """
    layers = {}
    for name, child in network.named_modules():
        if _is_timm(child, "CondConv2d"):
            if has_hooks(child):
                raise ValueError(f"{name!r} has hooks, which would be lost: remove them first")
            layers[child] = FlatCondConv2d(child)
    if not layers:
        raise ValueError(f"{type(network).__name__} has no CondConv2d of timm's")
    network = replace_modules(network, layers)
    if channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network


class FlatCondConv2d(CondConv2d):
    """`CondConv2d` that holds its kernels as timm does: `weight` (E, O * C / groups * kh * kw)."""

    def __init__(self, source: Any) -> None:
        """Take over the parameters of timm's `source`."""
        with torch.device("meta"):
            super().__init__(
                source.in_channels,
                source.out_channels,
                source.kernel_size,
                source.stride,
                "same" if source.dynamic_padding else source.padding,
                source.dilation,
                source.groups,
                num_experts=source.num_experts,
            )
        self.weight = source.weight
        self.bias = source.bias
        self.train(source.training)

    def kernels(self) -> Tensor:
        return self.weight.view(
            self.num_experts, self.out_channels, self.in_channels // self.groups, *self.kernel_size
        )


def _check_convolutions(convolutions: Mapping[nn.Conv2d, str]) -> None:
    owners: dict[Tensor, str] = {}
    for convolution, name in convolutions.items():
        if not _is_known(convolution):
            fault = "has a forward of its own"
        elif convolution.padding_mode != "zeros":
            fault = f"pads with {convolution.padding_mode!r}"
        elif "weight" not in convolution._parameters or is_lazy(convolution.weight):
            fault = "computes its weight, or has none yet"
        elif has_hooks(convolution):
            fault = "has hooks"
        elif convolution.weight in owners:
            fault = f"has its weight from {owners[convolution.weight]!r}"
        else:
            owners[convolution.weight] = name
            continue
        raise ValueError(
            f"{type(convolution).__name__} {name!r} {fault}: "
            "it cannot be converted, leave it out through `where`"
        )


def _is_known(convolution: nn.Conv2d) -> bool:
    """Whether its forward is one that a CondConv can stand for."""
    kind = type(convolution)
    inherited = kind.forward in (nn.Conv2d.forward, Conv2dSame.forward)
    inherited &= kind._conv_forward is nn.Conv2d._conv_forward
    return "forward" not in vars(convolution) and (inherited or _is_timm(convolution, "Conv2dSame"))


def _is_timm(module: nn.Module, class_name: str) -> bool:
    """Whether it is timm's, which is not imported."""
    kind = type(module)
    return kind.__name__ == class_name and kind.__module__.startswith("timm.")


def _padding(convolution: nn.Conv2d) -> Padding:
    if isinstance(convolution, Conv2dSame) or _is_timm(convolution, "Conv2dSame"):
        return "same"
    # torch's words mean the same here: its "same" is for stride 1 only, where it is TensorFlow's.
    padding: Any = convolution.padding
    return padding if isinstance(padding, str) else pair(padding)  # pyright: ignore[reportReturnType]


def replace_modules(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the place of others, wherever these are; in place where that can be."""
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]
    return replacements.get(module, module)


def _check_delta(delta: float) -> None:
    # Less is a network whose routers do not learn, more is noise as large as the experts.
    if not 0.1 <= delta <= 0.5:
        raise ValueError(f"delta must be within 0.1 and 0.5, got {delta}")


def _spread(
    static: Tensor, num_experts: int, delta: float, generator: torch.Generator | None
) -> Tensor:
    base = static.to(torch.promote_types(static.dtype, torch.float32)) / math.sqrt(num_experts)
    noise = torch.randn(
        num_experts,
        *static.shape,
        generator=generator,
        dtype=base.dtype,
        device=generator.device if generator else "cpu",
    ).to(base.device)
    # One expert's share of a centred sum is a little less than the whole.
    noise = (noise - noise.mean(dim=0)) * math.sqrt(num_experts / (num_experts - 1))
    size = base.abs()
    if base.dim() > 1:
        size = base.flatten(1).square().mean(dim=1).sqrt()
        # Experts that are alike stay so: those of a layer of zeros, which is to learn, may not be.
        size = torch.where(size.any(), size, 1 / math.sqrt(num_experts * base[0].numel()))
    experts = base + delta * noise * size.view(-1, *[1] * (base.dim() - 1))
    return experts.to(static.dtype)


def _shuffle(static: Tensor, num_experts: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator else "cpu"
    elements = static.flatten()
    orders = [
        torch.randperm(elements.numel(), generator=generator, device=device).to(elements.device)
        for _ in range(num_experts)
    ]
    return torch.stack([elements[order] for order in orders]).unflatten(1, static.shape)
