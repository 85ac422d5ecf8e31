"""SSD (Liu et al., 2016): class scores and boxes from feature maps of falling resolution.

Shapes: B images, S input size, A anchors of all levels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from condconv import RoutedCondConv2d
from condconv.backbones.mobilenet_v1 import ConvNormAct, RoutedBlock, scale_channels
from detection.anchors import grid_anchors, ssd_anchor_sizes
from detection.models.anchor_network import AnchorLayout, AnchorNetwork
from detection.models.backbones import Backbone, MobileNetV1
from detection.models.layers import (
    join_levels,
    make_conv,
    reset_conv,
)
from detection.structures import RawPredictions


class SSD(AnchorNetwork):
    """Backbone, extra feature layers, and one box and one class predictor a level.

    Args:
        backbone: images (B, 3, S, S) -> feature maps, finest first.
        extras: makes the further levels, each computed from the one before; called with the
            channels of the backbone's last map.
        head: makes a predictor, called with its channels of input and of output.
        num_classes: K; the predictors give 1 + K logits an anchor, slot 0 is background.
        input_size: S.
        min_scale: side of the anchors of the first level, relative to the input.
        max_scale: of the last level.
        reduce_boxes_in_lowest_layer: three anchors a cell on the first level instead of six.
    """

    num_background = 1

    def __init__(
        self,
        *,
        backbone: Backbone,
        extras: Callable[[int], Sequence[nn.Module]],
        head: Callable[[int, int], nn.Module],
        num_classes: int,
        input_size: int,
        min_scale: float = 0.2,
        max_scale: float = 0.95,
        reduce_boxes_in_lowest_layer: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.input_size = input_size
        self.backbone = backbone
        self.extras = nn.ModuleList(extras(backbone.channels[-1]))
        levels = self.trace_levels(input_size)
        self.anchor_sizes = ssd_anchor_sizes(
            len(levels),
            min_scale=min_scale,
            max_scale=max_scale,
            reduce_boxes_in_lowest_layer=reduce_boxes_in_lowest_layer,
        )
        self.box_predictors = nn.ModuleList()
        self.class_predictors = nn.ModuleList()
        for (channels, _, _), own in zip(levels, self.anchor_sizes, strict=True):
            self.box_predictors.append(head(channels, len(own) * 4))
            self.class_predictors.append(head(channels, len(own) * (1 + num_classes)))
        # Classes start at a probability of 0.01 (Lin et al., 2017), boxes near their anchors.
        for predictors, bias in ((self.box_predictors, 0.0), (self.class_predictors, -4.6)):
            for predictor in predictors:
                reset_conv(predictor.get_submodule(_last_layer(predictor)), std=0.01, bias=bias)
        self.set_anchors(levels)

    @property
    def class_layers(self) -> list[str]:
        """Names of the convolutions whose output channels are (anchor of the cell, class slot)."""
        return [
            f"class_predictors.{level}.{_last_layer(predictor)}".rstrip(".")
            for level, predictor in enumerate(self.class_predictors)
        ]

    def forward(self, images: Tensor) -> RawPredictions:
        """images (B, 3, S, S), normalised -> deltas (B, A, 4), logits (B, A, 1 + K)."""
        anchors, level_sizes = self.find_anchors(images)
        levels = self.extract_levels(images)
        deltas = [predict(x) for predict, x in zip(self.box_predictors, levels, strict=True)]
        logits = [predict(x) for predict, x in zip(self.class_predictors, levels, strict=True)]
        return RawPredictions(
            join_levels(deltas, 4),
            join_levels(logits, 1 + self.num_classes),
            anchors,
            num_background=self.num_background,
            level_sizes=level_sizes,
        )

    def lay_anchors(self, grids: Sequence[tuple[int, int]], input_size: int) -> AnchorLayout:
        return AnchorLayout(
            grid_anchors(self.anchor_sizes, grids, input_size),
            tuple(
                rows * columns * len(own)
                for (rows, columns), own in zip(grids, self.anchor_sizes, strict=True)
            ),
        )

    def extract_levels(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, S, S) -> the feature map of each level, finest first."""
        levels = list(self.backbone(images))
        for extra in self.extras:
            levels.append(extra(levels[-1]))
        return levels


def make_extras(
    in_channels: int,
    *,
    depths: Sequence[int] = (512, 256, 256, 128),
    width: float = 1.0,
    num_experts: int = 1,
    separable: bool = False,
    norm_momentum: float = 0.03,
) -> list[nn.Module]:
    """Extra feature layers, each a 1 x 1 convolution to half its depth and a 3 x 3 of stride 2.

    Args:
        in_channels: of the backbone's last map.
        depths: channels of each.
        width: multiplies them.
        num_experts: 1 builds static layers.
        separable: the 3 x 3 convolution is depthwise, and a 1 x 1 follows (SSDLite, Sandler et
            al., 2018).
        norm_momentum: weight of a batch in batch norm's running statistics.
    """

    def layer(in_channels: int, out_channels: int, kernel_size: int, **options: int) -> ConvNormAct:
        return ConvNormAct(
            in_channels,
            out_channels,
            kernel_size,
            num_experts=num_experts,
            norm_momentum=norm_momentum,
            **options,
        )

    extras = []
    for depth in depths:
        out_channels, reduced = scale_channels(depth, width), scale_channels(depth // 2, width)
        layers: dict[str, nn.Module] = {"reduce": layer(in_channels, reduced, 1)}
        if separable:
            layers["depthwise"] = layer(reduced, reduced, 3, stride=2, groups=reduced)
            layers["expand"] = layer(reduced, out_channels, 1)
        else:
            layers["expand"] = layer(reduced, out_channels, 3, stride=2)
        extras.append(RoutedBlock(layers, in_channels=in_channels, num_experts=num_experts))
        in_channels = out_channels
    return extras


def make_predictor(
    in_channels: int,
    out_channels: int,
    *,
    num_experts: int = 1,
    separable: bool = False,
    norm_momentum: float = 0.03,
) -> nn.Module:
    """A 1 x 1 convolution with a bias; conditional, it routes by its own input.

    Args:
        num_experts: 1 builds a static one.
        separable: a depthwise 3 x 3 convolution, batch norm and ReLU6 come first (SSDLite), and
            share the routing.
        norm_momentum: weight of a batch in that batch norm's running statistics.
    """
    if separable:
        depthwise = ConvNormAct(
            in_channels,
            in_channels,
            3,
            groups=in_channels,
            num_experts=num_experts,
            norm_momentum=norm_momentum,
        )
        predict = make_conv(in_channels, out_channels, 1, num_experts=num_experts)
        layers: dict[str, nn.Module] = {"depthwise": depthwise, "predict": predict}
        return RoutedBlock(layers, in_channels=in_channels, num_experts=num_experts)
    if num_experts > 1:
        return RoutedCondConv2d(in_channels, out_channels, 1, num_experts=num_experts)
    return nn.Conv2d(in_channels, out_channels, 1)


def _last_layer(predictor: nn.Module) -> str:
    return "layers.predict" if isinstance(predictor, RoutedBlock) else ""


def ssd_mobilenet_v1(
    *,
    num_classes: int,
    width: float = 1.0,
    num_experts: int = 1,
    input_size: int = 300,
    min_scale: float = 0.2,
    max_scale: float = 0.95,
    reduce_boxes_in_lowest_layer: bool = True,
    norm_momentum: float = 0.03,
) -> SSD:
    """The paper's SSD MobileNetV1: CondConv in blocks 6 to 13 and in the extra feature layers.

    Args:
        num_classes: K, without background.
        width: multiplies the channels of the backbone and of the extra layers.
        num_experts: experts a conditional layer; 1 builds the static network.
        input_size: side of the square input in pixels.
        min_scale: as in `SSD`.
        max_scale: as in `SSD`.
        reduce_boxes_in_lowest_layer: as in `SSD`.
        norm_momentum: weight of a batch in batch norm's running statistics.
    """
    return SSD(
        backbone=MobileNetV1(width=width, num_experts=num_experts, norm_momentum=norm_momentum),
        extras=partial(
            make_extras, width=width, num_experts=num_experts, norm_momentum=norm_momentum
        ),
        head=make_predictor,
        num_classes=num_classes,
        input_size=input_size,
        min_scale=min_scale,
        max_scale=max_scale,
        reduce_boxes_in_lowest_layer=reduce_boxes_in_lowest_layer,
    )
