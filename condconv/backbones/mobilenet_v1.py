"""MobileNetV1 (Howard et al., 2017), static or with CondConv, as TensorFlow builds it.

"SAME" padding as TensorFlow does it, batch norm with epsilon 0.001, ReLU6.
"""

from __future__ import annotations

from torch import Tensor, nn

from condconv.layers import CondConv2d, Conv2dSame, Router

# (output channels, stride) of the 13 separable blocks.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
FIRST_CONDITIONAL_BLOCK = 6  # counted from 1, as in the paper


def scale_channels(channels: int, width: float) -> int:
    """Channels at a width multiplier: max(int(channels * width), 16)."""
    return max(int(channels * width), 16)


class ConvNormAct(nn.Module):
    """Convolution with SAME padding, batch norm, ReLU6; conditional where num_experts > 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        num_experts: int = 1,
        norm_momentum: float = 0.03,
    ) -> None:
        super().__init__()
        if num_experts > 1:
            self.conv = CondConv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding="same",
                groups=groups,
                bias=False,
                num_experts=num_experts,
            )
        else:
            self.conv = Conv2dSame(
                in_channels, out_channels, kernel_size, stride, groups=groups, bias=False
            )
        self.norm = nn.BatchNorm2d(out_channels, eps=0.001, momentum=norm_momentum)
        self.activation = nn.ReLU6(inplace=True)
        # TensorFlow's truncated normal is cut at two standard deviations.
        nn.init.trunc_normal_(self.conv.weight, std=0.03, a=-0.06, b=0.06)

    def forward(self, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), routing_weights (B, E) where conditional -> (B, O, H', W')."""
        x = self.conv(x) if routing_weights is None else self.conv(x, routing_weights)
        return self.activation(self.norm(x))


class RoutedBlock(nn.Module):
    """Layers in a row that share one routing, computed from the block's input.

    Args:
        layers: the layers by name, first to last.
        in_channels: channels of the block's input.
        num_experts: 1 builds no router.
    """

    def __init__(self, layers: dict[str, nn.Module], *, in_channels: int, num_experts: int):
        super().__init__()
        self.router = Router(in_channels, num_experts) if num_experts > 1 else None
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        routing_weights = None if self.router is None else self.router(x)
        for layer in self.layers.values():
            x = layer(x) if routing_weights is None else layer(x, routing_weights)
        return x


class MobileNetV1(nn.Module):
    """MobileNetV1 up to its last separable block.

    Args:
        width: multiplies the channels of every layer.
        num_experts: experts of the separable blocks 6 to 13; 1 builds the static network.
        norm_momentum: weight of a batch in the running statistics (TensorFlow's 1 - decay).
    """

    def __init__(
        self, *, width: float = 1.0, num_experts: int = 1, norm_momentum: float = 0.03
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width must be positive, got {width}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        channels = scale_channels(32, width)
        self.stem = ConvNormAct(3, channels, 3, stride=2, norm_momentum=norm_momentum)
        self.blocks = nn.ModuleList()
        for number, (block_channels, stride) in enumerate(BLOCKS, start=1):
            out_channels = scale_channels(block_channels, width)
            experts = num_experts if number >= FIRST_CONDITIONAL_BLOCK else 1
            depthwise = ConvNormAct(
                channels,
                channels,
                3,
                stride=stride,
                groups=channels,
                num_experts=experts,
                norm_momentum=norm_momentum,
            )
            pointwise = ConvNormAct(
                channels, out_channels, 1, num_experts=experts, norm_momentum=norm_momentum
            )
            self.blocks.append(
                RoutedBlock(
                    {"depthwise": depthwise, "pointwise": pointwise},
                    in_channels=channels,
                    num_experts=experts,
                )
            )
            channels = out_channels
        self.feature_channels = (scale_channels(512, width), channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) -> the outputs of blocks 11 (stride 16) and 13 (stride 32)."""
        x = self.stem(x)
        for block in self.blocks[:11]:
            x = block(x)
        stride16 = x
        for block in self.blocks[11:]:
            x = block(x)
        return stride16, x
