"""A conditional network for one camera or scene: routing frozen, kernels mixed once.

Shapes: B batch, N examples of all passes, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv.autocast import disable_autocast
from condconv.convert import replace_modules
from condconv.diagnostics import RoutingSummary, capture_routing, summarize_routing
from condconv.geometry import pad_input
from condconv.layers import CondConv2d, RoutedCondConv2d, Router
from condconv.modes import keep_modes
from condconv.shared_routing import SharedRouting


class FixedConv2d(nn.Conv2d):
    """A `CondConv2d` of which one mixture is left; routing weights change nothing."""

    def __init__(self, layer: CondConv2d, routing_weights: Tensor) -> None:
        """Mix the kernels and biases of `layer` with weights (E,)."""
        with torch.device("meta"):
            super().__init__(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                dilation=layer.dilation,
                groups=layer.groups,
                bias=layer.bias is not None,
            )
        self.padding = layer.padding  # pyright: ignore[reportAttributeAccessIssue]
        kernels, weights = layer.kernels().detach(), routing_weights.to(layer.weight)
        with disable_autocast(kernels):
            self.weight = nn.Parameter((weights @ kernels.flatten(1)).view_as(kernels[0]))
            if layer.bias is not None:
                self.bias = nn.Parameter(weights @ layer.bias.detach())
        self.requires_grad_(layer.weight.requires_grad)
        self.train(layer.training)

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, O, H', W')."""
        x, padding = pad_input(x, self.kernel_size, self.stride, self.padding, self.dilation)  # pyright: ignore
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class NoRouter(nn.Module):
    """In the place of a router whose weights no layer needs any more; gives None."""

    def forward(self, x: Tensor) -> None:
        return None


@torch.no_grad()
def specialize(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, RoutingSummary]:
    """Freeze routing to its mean over samples and fold every CondConv into a convolution, in place.

    What is left is a static network, with the parameters of one built with one expert, by name and
    shape, and its arithmetic. A layer that runs several times a pass, as the towers of a RetinaNet
    on each level of the pyramid, gets the mean over all its runs.

    Its routers are gone: those that blocks have of their own give None. Only timm's blocks go on
    computing theirs, `routing_fn`, whose result is not used; an exported graph leaves it out.

    Args:
        network: called with each batch, in inference mode; must not be a CondConv layer itself.
        batches: images (B, C, H, W), as the network takes them.

    Returns:
        How each router behaved on the samples: the smaller the deviations, the less is lost.

    Raises:
        ValueError: where there is no CondConv layer below `network`, no batch, or a layer did not
            run, which it names. Nothing has changed then.
    """
    layers = {
        child: name for name, child in network.named_modules() if isinstance(child, CondConv2d)
    }
    if not layers or network in layers:
        raise ValueError(f"there is no CondConv layer below {type(network).__name__}")
    seen: dict[CondConv2d, list[Tensor]] = {layer: [] for layer in layers}
    with ExitStack() as hooks, keep_modes(network.modules()), capture_routing(network) as routing:
        for layer in layers:

            def take_argument(
                module: nn.Module, args: Any, kwargs: Any, layer: CondConv2d = layer
            ) -> None:
                weights = kwargs.get("routing_weights", args[1] if len(args) > 1 else None)
                if weights is not None:  # else the layer asks a router of its own
                    seen[layer].append(weights)

            def take_output(
                module: nn.Module, _: Any, output: Tensor, layer: CondConv2d = layer
            ) -> None:
                seen[layer].append(output)

            hooks.callback(layer.register_forward_pre_hook(take_argument, with_kwargs=True).remove)
            if isinstance(layer, RoutedCondConv2d):
                hooks.callback(layer.router.register_forward_hook(take_output).remove)
        network.eval()
        for images in batches:
            network(images)
    idle = [layers[layer] for layer, weights in seen.items() if not weights]
    if idle:
        raise ValueError(f"{', '.join(idle)} did not run: their routing is not known")

    replace_modules(
        network,
        {layer: FixedConv2d(layer, torch.cat(weights).mean(0)) for layer, weights in seen.items()},
    )
    for block in list(network.modules()):
        if isinstance(block, SharedRouting):
            block.restore_class()
    routers = [child for child in network.modules() if isinstance(child, Router)]
    replace_modules(network, {router: NoRouter() for router in routers})
    return summarize_routing(routing)
