"""SSD (Liu et al., 2016): class scores and boxes from feature maps of falling resolution.

Shapes: B images, S input size, A anchors of all levels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from condconv.backbones.mobilenet_v1 import ConvNormAct, MobileNetV1, RoutedBlock, scale_channels
from detection.anchors import grid_anchors, ssd_anchor_sizes
from detection.structures import RawPredictions


class SSD(nn.Module):
    """Backbone, extra feature layers, and one box and one class predictor a level.

    Args:
        backbone: images (B, 3, S, S) -> feature maps.
        extras: further levels, each computed from the one before.
        channels: of each level, the backbone's first.
        anchor_sizes: for each level, (width, height) of its anchors relative to the input.
        num_classes: K; the predictors give 1 + K logits an anchor, slot 0 is background.
        input_size: S.
    """

    anchors: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        extras: Sequence[nn.Module],
        channels: Sequence[int],
        anchor_sizes: Sequence[Sequence[tuple[float, float]]],
        num_classes: int,
        input_size: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.input_size = input_size
        self.backbone = backbone
        self.extras = nn.ModuleList(extras)
        self.box_predictors = nn.ModuleList()
        self.class_predictors = nn.ModuleList()
        for level_channels, sizes in zip(channels, anchor_sizes, strict=True):
            self.box_predictors.append(nn.Conv2d(level_channels, len(sizes) * 4, 1))
            self.class_predictors.append(
                nn.Conv2d(level_channels, len(sizes) * (1 + num_classes), 1)
            )
        self.reset_predictors()
        grids = self._trace_grids()
        self.register_buffer(
            "anchors", grid_anchors(anchor_sizes, grids, input_size), persistent=False
        )

    def reset_predictors(self) -> None:
        """Start classes at a probability of 0.01 (Lin et al., 2017), boxes near their anchors."""
        for predictors, bias in ((self.box_predictors, 0.0), (self.class_predictors, -4.6)):
            for name, parameter in predictors.named_parameters():
                if name.endswith("bias"):
                    nn.init.constant_(parameter, bias)
                else:
                    nn.init.normal_(parameter, std=0.01)

    def forward(self, images: Tensor) -> RawPredictions:
        """images (B, 3, S, S), normalised -> deltas (B, A, 4), logits (B, A, 1 + K)."""
        if images.shape[-2:] != (self.input_size, self.input_size):
            raise ValueError(
                f"the network takes {self.input_size} x {self.input_size} images, "
                f"got {images.shape[-2]} x {images.shape[-1]}"
            )
        levels = self.extract_levels(images)
        deltas = _predict(self.box_predictors, levels, 4)
        logits = _predict(self.class_predictors, levels, 1 + self.num_classes)
        return RawPredictions(deltas, logits, self.anchors)

    def extract_levels(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, S, S) -> the feature map of each level, finest first."""
        levels = list(self.backbone(images))
        for extra in self.extras:
            levels.append(extra(levels[-1]))
        return levels

    @torch.no_grad()
    def _trace_grids(self) -> list[tuple[int, int]]:
        training = self.training
        levels = self.eval().extract_levels(torch.zeros(1, 3, self.input_size, self.input_size))
        self.train(training)
        return [(level.shape[-2], level.shape[-1]) for level in levels]


def _predict(predictors: nn.ModuleList, levels: list[Tensor], size: int) -> Tensor:
    """Join the predictions of all levels: (B, A, size), ordered like the anchors."""
    outputs = (
        predictor(level).permute(0, 2, 3, 1).reshape(level.shape[0], -1, size)
        for predictor, level in zip(predictors, levels, strict=True)
    )
    return torch.cat(list(outputs), dim=1)


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
        min_scale: side of the anchors of the first level, relative to the input.
        max_scale: of the last level.
        reduce_boxes_in_lowest_layer: three anchors a cell on the first level instead of six.
        norm_momentum: weight of a batch in batch norm's running statistics.
    """
    backbone = MobileNetV1(width=width, num_experts=num_experts, norm_momentum=norm_momentum)
    channels = list(backbone.feature_channels)
    extras = []
    for depth in (512, 256, 256, 128):
        in_channels, out_channels = channels[-1], scale_channels(depth, width)
        reduced = scale_channels(depth // 2, width)
        reduce = ConvNormAct(
            in_channels, reduced, 1, num_experts=num_experts, norm_momentum=norm_momentum
        )
        expand = ConvNormAct(
            reduced, out_channels, 3, stride=2, num_experts=num_experts, norm_momentum=norm_momentum
        )
        extras.append(
            RoutedBlock(
                {"reduce": reduce, "expand": expand},
                in_channels=in_channels,
                num_experts=num_experts,
            )
        )
        channels.append(out_channels)
    return SSD(
        backbone=backbone,
        extras=extras,
        channels=channels,
        anchor_sizes=ssd_anchor_sizes(
            len(channels),
            min_scale=min_scale,
            max_scale=max_scale,
            reduce_boxes_in_lowest_layer=reduce_boxes_in_lowest_layer,
        ),
        num_classes=num_classes,
        input_size=input_size,
    )
