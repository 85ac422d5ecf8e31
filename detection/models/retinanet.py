"""RetinaNet (Lin et al., 2017): a feature pyramid, and two towers that look at all its levels.

Shapes: B images, S input size, L levels, A anchors of all levels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detection.anchors import grid_anchors, retinanet_anchor_sizes
from detection.boxes import CodeWeights
from detection.models.anchor_network import AnchorLayout, AnchorNetwork
from detection.models.backbones import Backbone
from detection.models.layers import (
    ConvBlock,
    Norm,
    join_levels,
    reset_conv,
)
from detection.structures import RawPredictions

PRIOR_PROBABILITY = 0.01


class RetinaNet(AnchorNetwork):
    """Backbone, pyramid and head.

    Args:
        backbone: images (B, 3, S, S) -> feature maps, finest first.
        pyramid: makes the pyramid, called with the channels of the backbone's maps.
        head: makes the head, called with channels, anchors of a cell, K, and L.
        num_classes: K; the head gives K logits an anchor, none for background.
        input_size: S.
        anchor_scale: side of the smallest square anchor of a level, in strides.
        num_anchor_scales: sizes of anchors within an octave.
        anchor_ratios: height / width.
        torchvision_anchors: anchors as torchvision rounds and places them.
        code_weights: factors on the box codes, as in `detection.boxes.encode_boxes`.
    """

    num_background = 0

    def __init__(
        self,
        *,
        backbone: Backbone,
        pyramid: Callable[[Sequence[int]], FeaturePyramid],
        head: Callable[..., RetinaNetHead],
        num_classes: int,
        input_size: int,
        anchor_scale: float = 4.0,
        num_anchor_scales: int = 3,
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        torchvision_anchors: bool = False,
        code_weights: CodeWeights = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if len(code_weights) != 4 or not all(ratio > 0 for ratio in anchor_ratios):
            raise ValueError(
                f"it takes four code_weights and anchor_ratios above 0, got {tuple(code_weights)} "
                f"and {tuple(anchor_ratios)}"
            )
        self.num_classes = num_classes
        self.input_size = input_size
        self.anchor_scale = anchor_scale
        self.num_anchor_scales = num_anchor_scales
        self.anchor_ratios = anchor_ratios
        self.torchvision_anchors = torchvision_anchors
        self.code_weights = code_weights
        self.backbone = backbone
        self.pyramid = pyramid(backbone.channels)
        levels = self.trace_levels(input_size)
        self.set_anchors(levels)
        num_anchors = num_anchor_scales * len(anchor_ratios)
        self.head = head(self.pyramid.channels, num_anchors, num_classes, len(levels))

    @property
    def class_layers(self) -> list[str]:
        """Names of the convolutions whose output channels are (anchor of the cell, class slot)."""
        return [f"head.class_predictor.convs.{len(self.head.class_predictor.convs) - 1}"]

    def forward(self, images: Tensor) -> RawPredictions:
        """images (B, 3, S, S), normalised -> deltas (B, A, 4), logits (B, A, K)."""
        anchors, level_sizes = self.find_anchors(images)
        deltas, logits = self.head(self.extract_levels(images))
        return RawPredictions(
            deltas,
            logits,
            anchors,
            num_background=self.num_background,
            code_weights=self.code_weights,
            level_sizes=level_sizes,
        )

    def lay_anchors(self, grids: Sequence[tuple[int, int]], input_size: int) -> AnchorLayout:
        strides = list(self.backbone.strides)
        while len(strides) < len(grids):
            strides.append(strides[-1] * 2)
        sizes = retinanet_anchor_sizes(
            strides,
            input_size=input_size,
            scale=self.anchor_scale,
            num_scales=self.num_anchor_scales,
            ratios=self.anchor_ratios,
            whole_pixels=self.torchvision_anchors,
        )
        return AnchorLayout(
            grid_anchors(sizes, grids, input_size, centered=not self.torchvision_anchors),
            tuple(rows * columns * len(sizes[0]) for rows, columns in grids),
        )

    def extract_levels(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, S, S) -> the pyramid's maps, finest first."""
        return self.pyramid(self.backbone(images))


class FeaturePyramid(nn.Module):
    """Feature pyramid (Lin et al., 2017): P3 to P5 from C3 to C5 top-down, P6 and P7 beyond.

    Args:
        in_channels: of the backbone's maps, finest first.
        channels: of every level.
        num_extra: levels beyond the backbone's, each at half the size of the one before.
        extra_from: the first of these is computed from the backbone's last map, "c5", or from the
            pyramid's, "p5".
        separable: depthwise separable 3 x 3 convolutions.
        norm: as in `ConvBlock`.
        norm_momentum: as in `ConvBlock`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        channels: int = 256,
        num_extra: int = 2,
        extra_from: Literal["c5", "p5"] = "c5",
        separable: bool = False,
        norm: Norm = None,
        norm_momentum: float = 0.03,
    ) -> None:
        super().__init__()
        if extra_from not in ("c5", "p5"):
            raise ValueError(f'extra_from must be "c5" or "p5", got {extra_from!r}')
        self.channels = channels
        self.extra_from = extra_from

        def conv(in_channels: int, kernel_size: int, stride: int = 1) -> ConvBlock:
            return ConvBlock(
                in_channels,
                channels,
                kernel_size,
                stride=stride,
                separable=separable and kernel_size > 1,
                norm=norm,
                norm_momentum=norm_momentum,
                activation=False,
            )

        self.laterals = nn.ModuleList(conv(own, 1) for own in in_channels)
        self.outputs = nn.ModuleList(conv(channels, 3) for _ in in_channels)
        first = in_channels[-1] if extra_from == "c5" else channels
        self.extras = nn.ModuleList(
            conv(channels if place else first, 3, stride=2) for place in range(num_extra)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps, finest first -> (B, channels, H, W) of each level."""
        merged = [lateral(own) for lateral, own in zip(self.laterals, maps, strict=True)]
        for finer in reversed(range(len(merged) - 1)):
            above = F.interpolate(merged[finer + 1], size=merged[finer].shape[-2:])
            merged[finer] = merged[finer] + above
        levels = [output(own) for output, own in zip(self.outputs, merged, strict=True)]
        x = maps[-1] if self.extra_from == "c5" else levels[-1]
        for place, extra in enumerate(self.extras):
            x = extra(F.relu(x) if place else x)
            levels.append(x)
        return levels


class RetinaNetHead(nn.Module):
    """A tower for classes and one for boxes, shared by all levels.

    Each layer of a conditional tower routes by its own input: each image has its own kernels on
    each level.

    Args:
        channels: of the pyramid.
        num_anchors: of a cell.
        num_classes: K.
        num_levels: L.
        num_convs: layers of a tower.
        num_experts: of the towers' layers; 1 builds static ones.
        norm: as in `ConvBlock`; each level has its own batch statistics.
        norm_momentum: as in `ConvBlock`.
        separable: depthwise separable convolutions.
    """

    def __init__(
        self,
        channels: int,
        num_anchors: int,
        num_classes: int,
        num_levels: int,
        *,
        num_convs: int = 4,
        num_experts: int = 1,
        norm: Norm = None,
        norm_momentum: float = 0.03,
        separable: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes

        def tower() -> nn.ModuleList:
            return nn.ModuleList(
                ConvBlock(
                    channels,
                    channels,
                    3,
                    separable=separable,
                    num_experts=num_experts,
                    norm=norm,
                    norm_momentum=norm_momentum,
                    num_levels=num_levels,
                )
                for _ in range(num_convs)
            )

        def predictor(out_channels: int) -> ConvBlock:
            return ConvBlock(channels, out_channels, 3, separable=separable, activation=False)

        self.class_tower, self.box_tower = tower(), tower()
        self.class_predictor = predictor(num_anchors * num_classes)
        self.box_predictor = predictor(num_anchors * 4)
        prior = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        reset_conv(self.class_predictor.convs[-1], std=0.01, bias=prior)
        reset_conv(self.box_predictor.convs[-1], std=0.01)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The pyramid's maps -> deltas (B, A, 4), logits (B, A, K)."""
        deltas, logits = [], []
        for level, features in enumerate(levels):
            x = features
            for layer in self.class_tower:
                x = layer(x, level)
            logits.append(self.class_predictor(x))
            x = features
            for layer in self.box_tower:
                x = layer(x, level)
            deltas.append(self.box_predictor(x))
        return join_levels(deltas, 4), join_levels(logits, self.num_classes)
