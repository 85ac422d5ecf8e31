"""What heads and pyramids are made of.

Shapes: B images, C input channels, O output channels, L levels of a pyramid, A anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from condconv import CondConv2d, Router

Norm = Literal["batch", "group"] | None


class ConvBlock(nn.Module):
    """Convolution, then normalisation and ReLU where asked; separable or conditional where asked.

    Padding keeps the size (halved, rounded up, at stride 2). A separable one is depthwise, then
    pointwise, with nothing between. The convolutions of a conditional block share one routing,
    computed from its input. Kernels start normal, with the variance that keeps that of the signal.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: odd.
        stride: of the first convolution.
        separable: depthwise and pointwise instead of one convolution.
        num_experts: 1 builds no router.
        norm: None (the last convolution has a bias instead), "batch" or "group" (32 groups).
        norm_momentum: with "batch", weight of a batch in the running statistics.
        num_levels: with "batch", each level of a pyramid has batch statistics of its own.
        activation: end with ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        separable: bool = False,
        num_experts: int = 1,
        norm: Norm = None,
        norm_momentum: float = 0.03,
        num_levels: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.router = Router(in_channels, num_experts) if num_experts > 1 else None
        self.convs = nn.ModuleList()
        if separable:
            self.convs.append(
                make_conv(
                    in_channels,
                    in_channels,
                    kernel_size,
                    stride=stride,
                    groups=in_channels,
                    bias=False,
                    num_experts=num_experts,
                )
            )
            kernel_size = stride = 1
        self.convs.append(
            make_conv(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                bias=norm is None,
                num_experts=num_experts,
            )
        )
        self.norms = make_norms(norm, out_channels, num_levels, momentum=norm_momentum)
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()
        for conv in self.convs:
            gain = 2.0 if activation and conv is self.convs[-1] else 1.0
            reset_conv(conv, std=math.sqrt(gain / kernel_fan_in(conv)))

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        """x (B, C, H, W) of a level -> (B, O, H', W')."""
        routing_weights = None if self.router is None else self.router(x)
        for conv in self.convs:
            x = conv(x) if routing_weights is None else conv(x, routing_weights)
        if self.norms:
            x = self.norms[min(level, len(self.norms) - 1)](x)
        return self.activation(x)


def make_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = True,
    num_experts: int = 1,
) -> nn.Conv2d | CondConv2d:
    """A convolution that keeps the size, at stride 2 half of it; conditional with experts."""
    arguments = (in_channels, out_channels, kernel_size, stride, kernel_size // 2, 1, groups, bias)
    if num_experts > 1:
        return CondConv2d(*arguments, num_experts=num_experts)
    return nn.Conv2d(*arguments)


def kernel_fan_in(conv: nn.Module) -> int:
    """Inputs of one output of a convolution, static or conditional."""
    assert isinstance(conv, (nn.Conv2d, CondConv2d))
    return math.prod(conv.weight.shape[-3:])


def reset_conv(conv: nn.Module, *, std: float, bias: float = 0.0) -> None:
    """Start a convolution, static or conditional, with normal kernels and one bias."""
    assert isinstance(conv, (nn.Conv2d, CondConv2d))
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)


def make_norms(norm: Norm, channels: int, num_levels: int, *, momentum: float) -> nn.ModuleList:
    """One for each level where statistics are of batches, one for all otherwise, or none."""
    if norm == "batch":
        # As the TensorFlow Object Detection API has them.
        return nn.ModuleList(
            nn.BatchNorm2d(channels, eps=0.001, momentum=momentum) for _ in range(num_levels)
        )
    if norm == "group":
        return nn.ModuleList([nn.GroupNorm(32, channels)])
    if norm is None:
        return nn.ModuleList()
    raise ValueError(f'norm must be null, "batch" or "group", got {norm!r}')


def join_levels(levels: Sequence[Tensor], size: int) -> Tensor:
    """Predictions of all levels, each (B, anchors of a cell * size, H, W) -> (B, A, size).

    The order is that of the anchors: level, row, column, anchor of the cell.
    """
    return torch.cat(
        [level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, size) for level in levels], dim=1
    )
