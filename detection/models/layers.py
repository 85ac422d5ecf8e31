"""What heads and pyramids are made of.

Shapes: B images, C input channels, O output channels, L levels of a pyramid, A anchors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

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
        self.norms = make_norms(norm, out_channels, num_levels)
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


def make_norms(norm: Norm, channels: int, num_levels: int) -> nn.ModuleList:
    """One for each level where statistics are of batches, one for all otherwise, or none."""
    if norm == "batch":
        # As the TensorFlow Object Detection API has them.
        return nn.ModuleList(
            nn.BatchNorm2d(channels, eps=0.001, momentum=0.03) for _ in range(num_levels)
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


class AnchorLayout(NamedTuple):
    """The anchors of an input size.

    Args:
        anchors: (A, 4) float32, xyxy in input pixels.
        level_sizes: anchors of each level.
    """

    anchors: Tensor
    level_sizes: tuple[int, ...]


class AnchorNetwork(nn.Module):
    """A network of square inputs, whose anchors lie on the grids of its feature maps.

    It takes inputs of `input_size`; of others after `take_sizes`.
    """

    input_size: int
    anchors: Tensor
    level_sizes: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self.other_layouts: dict[int, AnchorLayout] = {}

    def extract_levels(self, images: Tensor) -> Sequence[Tensor]:
        """images (B, 3, S, S) -> the feature map of each level, finest first."""
        raise NotImplementedError

    def lay_anchors(self, grids: Sequence[tuple[int, int]], input_size: int) -> AnchorLayout:
        """The anchors that the network would have were it built for `input_size`.

        Args:
            grids: (rows, columns) of each level's map.
        """
        raise NotImplementedError

    def take_sizes(self, input_sizes: Sequence[int]) -> None:
        """Take square inputs of these sides too, each with the anchors of a network built for it.

        Raises:
            ValueError: where the backbone cannot take one.
        """
        for size in {*input_sizes} - {self.input_size}:
            grids = [(rows, columns) for _, rows, columns in trace_levels(self, size)]
            anchors, level_sizes = self.lay_anchors(grids, size)
            # No buffers: DistributedDataParallel would send them all at each step.
            anchors = anchors.to(self.anchors.device)
            self.other_layouts[size] = AnchorLayout(anchors, level_sizes)

    def find_anchors(self, images: Tensor) -> AnchorLayout:
        """The anchors for images (B, 3, H, W).

        Raises:
            ValueError: where they have no size that the network takes.
        """
        height, width = images.shape[-2:]
        if (height, width) == (self.input_size, self.input_size):
            return AnchorLayout(self.anchors, self.level_sizes)
        if height == width and width in self.other_layouts:
            return self.other_layouts[width]
        raise ValueError(
            f"the network takes {self.input_size} x {self.input_size} images, "
            f"got {height} x {width}"
        )


class Levels(Protocol):
    """A network that gives the feature maps it predicts from."""

    def extract_levels(self, images: Tensor) -> Sequence[Tensor]: ...


def trace_levels(network: Levels, input_size: int) -> list[tuple[int, int, int]]:
    """(channels, rows, columns) of each level for a square input; nothing is computed.

    Raises:
        ValueError: where the network cannot take that size.
    """
    traced = copy.deepcopy(network)
    assert isinstance(traced, nn.Module)
    traced.to("meta").eval()
    try:
        levels = traced.extract_levels(torch.zeros(1, 3, input_size, input_size, device="meta"))
    # The layers of any backbone, which answer a size they cannot take in their own way.
    except Exception as error:
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise ValueError(
            f"the backbone cannot take images of {input_size} x {input_size}: {reason}"
        ) from error
    return [(level.shape[1], level.shape[2], level.shape[3]) for level in levels]
