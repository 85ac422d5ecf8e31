"""Modules: the router, the conditional convolution, and the two joined.

Shapes: B batch, E experts, C input channels, O output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, Self

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from condconv.autocast import disable_autocast
from condconv.functional import condconv2d
from condconv.geometry import Padding, check_padding, pad_input, pair


class Conv2dSame(nn.Conv2d):
    """`nn.Conv2d` with TensorFlow's SAME padding, at any stride."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        x, padding = pad_input(
            x, pair(self.kernel_size), pair(self.stride), "same", pair(self.dilation)
        )
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


def route(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (E, C), bias (E,) -> routing weights (B, E)."""
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be (B, {weight.shape[1]}, H, W), got {tuple(x.shape)}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with disable_autocast(x):
        pooled = x.mean(dim=(2, 3), dtype=dtype)
        logits = F.linear(pooled, weight.to(dtype), bias.to(dtype))
    return torch.sigmoid(logits)


# Calls to a tracer of torch.fx, which cannot follow checks of shapes.
torch.fx.wrap("route")
torch.fx.wrap("condconv2d")
torch.fx.wrap("pad_input")


class Router(nn.Module):
    """Routing weights of each example: sigmoid(Linear(global average pool(x))).

    Weights start Glorot-uniform and the bias at 0, as in the official code. Computed in float32
    at least, under autocast and in half-precision networks too: the weights scale whole kernels.
    """

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, E) in (0, 1).

        Raises:
            ValueError: where x has another shape.
        """
        return route(x, self.linear.weight, self.linear.bias)


def check_num_experts(num_experts: Any) -> None:
    if isinstance(num_experts, bool) or not isinstance(num_experts, Integral) or num_experts < 1:
        raise ValueError(f"num_experts must be a whole number from 1 on, got {num_experts!r}")


class CondConv2d(nn.Module):
    """A convolution whose kernel is, for each example, a weighted sum of expert kernels.

    Takes the arguments of `nn.Conv2d` and `num_experts`; `padding` also takes "same" as
    TensorFlow does it, at any stride. Every expert starts like the convolution it replaces: the
    fan is that of one kernel.

    Attributes:
        weight: (E, O, C / groups, kh, kw).
        bias: (E, O) or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        num_experts: int,
    ) -> None:
        super().__init__()
        check_num_experts(num_experts)
        if groups < 1 or min(pair(stride)) < 1:
            raise ValueError(f"groups and stride must be at least 1, got {groups} and {stride}")
        if min(pair(kernel_size)) < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{in_channels} input and {out_channels} output channels "
                f"cannot be split into {groups} groups"
            )
        check_padding(padding)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(kernel_size)
        self.stride = pair(stride)
        self.padding: Padding = padding if isinstance(padding, str) else pair(padding)
        self.dilation = pair(dilation)
        self.groups = groups
        self.num_experts = num_experts
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as `nn.Conv2d` starts: uniform within 1 / sqrt(fan in)."""
        bound = 1 / math.sqrt(self.kernels()[0, 0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def kernels(self) -> Tensor:
        """The expert kernels (E, O, C / groups, kh, kw), however `weight` holds them."""
        return self.weight

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        """x (B, C, H, W), routing_weights (B, E) -> (B, O, H', W')."""
        return condconv2d(
            x,
            self.kernels(),
            routing_weights,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `Module.to(memory_format=torch.channels_last)` hands every 4-D and 5-D parameter to a
        # conversion that takes 4-D ones only. Mixing wants the kernels in a row in any case.
        def apply(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten(1)).view(tensor.shape) if tensor.dim() == 5 else fn(tensor)

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, num_experts={self.num_experts}"
        )


class RoutedCondConv2d(CondConv2d):
    """`CondConv2d` with a `Router` of its own: used like `nn.Conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        num_experts: int,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            num_experts=num_experts,
        )
        self.router = Router(in_channels, num_experts)

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, O, H', W'), routed by the router unless weights are given."""
        return super().forward(x, self.router(x) if routing_weights is None else routing_weights)
