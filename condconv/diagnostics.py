"""How a network routes: the routing weights of its forward passes, and what they say.

Shapes: B batch, N examples of all passes, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv.layers import CondConv2d, Router

SATURATION = 0.01


class RoutingSummary(NamedTuple):
    """Plain numbers of one router.

    Args:
        mean: of each expert's weight, over the examples.
        deviation: standard deviation of each expert's weight over the examples; near 0 for all
            experts, the layer is hardly conditional.
        entropy: of the weights divided by their sum, in nats, mean over the examples: 0 where one
            expert has all, ln E where all have the same.
        saturated: share of the weights nearer to 0 or 1 than 0.01, where the sigmoid lets almost
            no gradient through.
        unused: the experts whose weight is below 0.01 for every example.
    """

    mean: list[float]
    deviation: list[float]
    entropy: float
    saturated: float
    unused: list[int]


def find_routers(network: nn.Module) -> dict[str, nn.Module]:
    """The routers of a network by name: `Router` modules, and the linear layers `routing_fn` of
    timm's CondConv blocks."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, Router) or name.rpartition(".")[2] == "routing_fn"
    }


@contextmanager
def capture_routing(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the routing weights of all forward passes inside the `with`.

        with capture_routing(network) as routing:
            network(images)

    Gives a dictionary from the name of each router in `network` that ran, in the order in which
    they first did, to its weights (N, E): detached, on the CPU, a row for each example of each
    call. Routers are those of `find_routers`. Under activation checkpointing, a backward pass
    inside the `with` runs the routers again, and every row comes twice.

    Raises:
        ValueError: where `network` has no router; at the end, where none ran. A network that has
            been compiled passes by the hooks: capture from the original.
    """
    routers = find_routers(network)
    if not routers:
        raise ValueError(f"{type(network).__name__} has no router: it is not conditional")
    routing: dict[str, Tensor] = {}

    with ExitStack() as hooks:
        for name, router in routers.items():

            def collect(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                weights = output if isinstance(module, Router) else output.sigmoid()
                weights = weights.detach().cpu()
                routing[name] = torch.cat([routing[name], weights]) if name in routing else weights

            hooks.callback(router.register_forward_hook(collect).remove)
        yield routing
    if not routing:
        raise ValueError("no router ran: call the network inside the `with`, and not compiled")


def summarize_routing(routing: Mapping[str, Tensor]) -> dict[str, RoutingSummary]:
    """What `capture_routing` has collected, (N, E) a router, in plain numbers."""
    return {name: _summarize(weights) for name, weights in routing.items()}


def compare_experts(network: nn.Module) -> dict[str, Tensor]:
    """Cosine similarity of the experts' kernels, (E, E) on the CPU, for each CondConv2d's name.

    Off the diagonal 1 means that experts are the same, 0 that they have nothing in common.
    """
    similarities = {}
    for name, module in network.named_modules():
        if isinstance(module, CondConv2d):
            directions = F.normalize(module.weight.detach().float().flatten(1))
            similarities[name] = (directions @ directions.t()).cpu()
    return similarities


def _summarize(weights: Tensor) -> RoutingSummary:
    weights = weights.double()
    total = weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    saturated = (weights < SATURATION) | (weights > 1 - SATURATION)
    return RoutingSummary(
        mean=weights.mean(dim=0).tolist(),
        deviation=weights.std(dim=0, correction=0).tolist(),
        entropy=torch.special.entr(weights / total).sum(dim=1).mean().item(),
        saturated=saturated.double().mean().item(),
        unused=(weights < SATURATION).all(dim=0).nonzero()[:, 0].tolist(),
    )
