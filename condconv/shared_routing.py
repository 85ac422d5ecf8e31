"""One routing for the layers of a block, of any network: a trace of its forward passes it on.

Shapes: B batch, C input channels, H, W a map.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Mapping, Set
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from condconv.layers import CondConv2d, RoutedCondConv2d, Router
from condconv.modes import keep_modes

# Those that tell no number of channels, and give another one than they take.
CHANGES_CHANNELS = (
    nn.Flatten,
    nn.Fold,
    nn.GLU,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Unflatten,
    nn.Unfold,
)


class SharedRouting(nn.Module):
    """What `convert_to_condconv` mixes into the class of a block: one routing for its layers.

    The block stays an instance of its class and keeps all that it has. Its forward becomes a trace
    (`torch.fx`) of its class's, with the input as the only argument, in which every `CondConv2d`
    called with an input alone also gets the routing weights. What the forward decides by attributes
    is decided once, for training and evaluation each. Containers between the block and these layers
    are traced through: hooks on them are not called.

    Attributes:
        router: routes by the block's input (B, C, H, W).
    """

    router: Router
    _forwards: dict[bool, Callable[[nn.Module, Tensor], Any]]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if len(inputs) != 1 or options:
            name = type(self).__bases__[1].__name__
            raise TypeError(
                f"{name} shares a routing and so takes its input alone, by position: leave it out "
                "of `share_within`"
            )
        return self._forwards[self.training](self, inputs[0])

    def class_forward(self, x: Tensor) -> Any:
        """The forward of the block's own class: what is traced."""
        return super().forward(x)

    def renew_forward(self) -> None:
        """Trace anew, after a change of the block's layers."""
        routed = {
            child
            for child in self.modules()
            if isinstance(child, CondConv2d) and not isinstance(child, RoutedCondConv2d)
        }
        self._forwards = {}
        for training, graph in _trace(self, routed).items():
            x = next(iter(graph.nodes))
            with graph.inserting_after(x):
                routing_weights = graph.call_module("router", (x,))
            for node in _calls(self, graph, routed):
                if len(node.args) == 1:
                    node.args = (*node.args, routing_weights)
            if not routing_weights.users:
                graph.erase_node(routing_weights)
            self._forwards[training] = type(fx.GraphModule(self, graph)).forward

    def restore_class(self) -> None:
        """Undo the mixing in, where no layer takes a routing any more."""
        del self.router, self._forwards
        self.__class__ = type(self).__bases__[1]  # pyright: ignore[reportAttributeAccessIssue]

    # The class is made at run time and its forward is code: neither can be pickled.
    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_block, (type(self).__bases__[1],), *state

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())  # pyright: ignore[reportAttributeAccessIssue]
        del state["_forwards"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.renew_forward()


def share_routing(block: nn.Module) -> None:
    """Mix `SharedRouting` into a block that has its `router` and its conditional layers."""
    block.__class__ = _routed_class(type(block))
    assert isinstance(block, SharedRouting)
    block.renew_forward()


@cache
def _routed_class(block_class: type[nn.Module]) -> type[SharedRouting]:
    return type(f"Routed{block_class.__name__}", (SharedRouting, block_class), {})


def _new_block(block_class: type[nn.Module]) -> SharedRouting:
    routed_class = _routed_class(block_class)
    return routed_class.__new__(routed_class)


class _Tracer(fx.Tracer):
    def __init__(self, opened: set[nn.Module]) -> None:
        super().__init__()
        self.traced_func_name = "class_forward"
        self.opened = opened
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if m in self.opened:
            return m.forward(*args, **kwargs)  # without its hooks, which take tensors
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        if _modes() != self.modes:
            raise ValueError("its forward sets autocast or gradients, which a trace leaves out")
        return super().create_proxy(*args, **kwargs)


def _modes() -> list[bool]:
    """What a context may have set for the operations in it."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return [torch.is_grad_enabled(), *autocast]


def _trace(block: SharedRouting, layers: Set[nn.Module]) -> dict[bool, fx.Graph]:
    """Graphs of a block in training and not, in which calls of `layers` are nodes.

    What contains none of them is a node too, and so keeps a control flow of its own.
    """
    opened = {
        child
        for child in block.modules()
        if child not in layers and not layers.isdisjoint(child.modules())
    }
    graphs = {}
    modules: Any = block._modules
    if isinstance(block, nn.Sequential):  # it calls all that it holds, and would call its router
        block._modules = {name: child for name, child in modules.items() if name != "router"}
    try:
        with keep_modes(opened):
            for training in (True, False):
                for child in opened:
                    child.training = training
                graphs[training] = _Tracer(opened).trace(block)
    finally:
        block._modules = modules
    return graphs


def _calls(block: nn.Module, graph: fx.Graph, layers: Set[nn.Module]) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_module" and block.get_submodule(str(node.target)) in layers
    ]


def find_blocks(
    module: nn.Module,
    convolutions: Mapping[nn.Conv2d, str],
    share_within: Callable[[str, nn.Module], bool],
) -> dict[nn.Module, int]:
    """The blocks that share a routing, and the channels of their inputs."""
    blocks = {}
    taken: dict[nn.Conv2d, str] = {}
    for name, child in module.named_modules():
        inside = pick(child, convolutions)
        if child in inside or not inside or not share_within(name, child):
            continue
        for layer in inside:
            if layer in taken:
                raise ValueError(
                    f"{convolutions[layer]} lies in {taken[layer]!r} and in {name!r}: "
                    "let `share_within` pick one of them"
                )
            taken[layer] = name
        try:
            blocks[child] = _input_channels(child, set(inside))
        # Tracing runs the block's code, which can fail in any way.
        except Exception as error:
            reason = (str(error) or repr(error)).strip().splitlines()[0]
            raise ValueError(
                f"{type(child).__name__} {name!r} cannot share a routing: {reason}"
            ) from error
    if not blocks:
        raise ValueError("`share_within` picks no module with a convolution to convert")
    return blocks


def pick(module: nn.Module, convolutions: Container[nn.Conv2d]) -> list[nn.Conv2d]:
    """Those of the convolutions that lie in a module."""
    return [
        child
        for child in module.modules()
        if isinstance(child, nn.Conv2d) and child in convolutions
    ]


def _input_channels(block: nn.Module, convolutions: Set[nn.Module]) -> int:
    """Channels of a block's input; fails where its convolutions cannot share a routing."""
    if getattr(block, "router", None) is not None:
        raise ValueError("it has a router already")
    if "forward" in vars(block):
        raise ValueError("its forward is not that of its class")
    for name, child in block.named_modules():
        if child is not block and has_hooks(child) and not convolutions.isdisjoint(child.modules()):
            raise ValueError(f"{name} has hooks, which a trace leaves out")
    # The same block under the other class: nothing of it is touched.
    view = _new_block(type(block))
    view.__dict__ = block.__dict__
    randomness = torch.get_rng_state(), random.getstate()
    graphs = _trace(view, convolutions)
    if not torch.get_rng_state().equal(randomness[0]) or random.getstate() != randomness[1]:
        raise ValueError("its forward draws random numbers, which a trace would keep")
    called = {
        block.get_submodule(str(node.target))
        for graph in graphs.values()
        for node in _calls(block, graph, convolutions)
    }
    for name, child in block.named_modules():
        if child in convolutions and child not in called:
            raise ValueError(f"its forward does not call {name}")

    nodes = list(graphs[False].nodes)
    unchanged = {nodes[0]}  # what has the channels of the input
    for node in nodes:
        if node.op == "call_module" and unchanged.issuperset(node.all_input_nodes):
            children = list(block.get_submodule(str(node.target)).modules())
            for child in children:
                channels = getattr(child, "in_channels", None) or getattr(
                    child, "num_features", None
                )
                if channels:
                    return channels
            if not any(isinstance(child, CHANGES_CHANNELS) for child in children):
                unchanged.add(node)
    raise ValueError("no convolution takes its whole input, which has to tell its channels")


def has_hooks(module: nn.Module) -> bool:
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
