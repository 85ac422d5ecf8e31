"""Backbones of detectors: networks that give feature maps, finest first."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter

import condconv.backbones
from condconv import accelerate_timm, convert_to_condconv
from condconv.backbones.mobilenet_v1 import BLOCKS, scale_channels
from detection.errors import first_line

# ImageNet's, on the scale 0 to 255.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# The paper's rules: how many residual blocks are conditional, from the last, by the beginning of
# the network's name. Their shortcuts, and what squeezes and excites, stay static.
CONDITIONAL_BLOCKS = {"resnet": 3, "tv_resnet": 3, "mobilenetv2": 6}
STATIC_PARTS = re.compile(r"\.(downsample|shortcut|se)\.")


class Backbone(nn.Module):
    """Images (B, 3, H, W), normalised -> feature maps.

    Attributes:
        channels: of each map, finest first.
        strides: of each map, in pixels.
        normalization: `mean` and `std`, as `detection.preprocess.Preprocess` takes them, of the
            images that published weights were trained on.
    """

    channels: Sequence[int]
    strides: Sequence[int]
    normalization: Mapping[str, Sequence[float]]
    _frozen: Collection[str] = ()

    def freeze(self, layers: Iterable[nn.Module], *, batch_norm: bool) -> None:
        """Keep the weights of some layers, and with `batch_norm` those of all batch norm.

        What is frozen stays in inference mode: batch norm keeps its statistics too.
        """
        kept = {child for layer in layers for child in layer.modules()}
        if batch_norm:
            kind = nn.modules.batchnorm._BatchNorm
            kept |= {child for child in self.modules() if isinstance(child, kind)}
        for module in kept:
            module.requires_grad_(False)
        # By name: what synchronises batch norm puts other modules in their places.
        self._frozen = {name for name, module in self.named_modules() if module in kept}
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name, module in self.named_modules():
            if name in self._frozen:
                module.training = False
        return self


class MobileNetV1(condconv.backbones.MobileNetV1, Backbone):
    """`condconv.backbones.MobileNetV1`: CondConv in its blocks 6 to 13.

    Args:
        width: multiplies the channels of every layer.
        num_experts: 1 builds the static network.
        norm_momentum: weight of a batch in the running statistics.
        strides: of the maps to give, of 2, 4, 8, 16 and 32.
        frozen_stages: layers up to the map of stride 2 ** frozen_stages keep their weights.
        freeze_batch_norm: batch norm keeps its weights and statistics.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_experts: int = 1,
        norm_momentum: float = 0.03,
        strides: Sequence[int] = (16, 32),
        frozen_stages: int = 0,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__(width=width, num_experts=num_experts, norm_momentum=norm_momentum)
        ends, stride = {}, 2
        for place, (_, block_stride) in enumerate(BLOCKS):
            stride *= block_stride
            ends[stride] = place
        check_strides("MobileNetV1", ends, strides)
        self.ends = [ends[stride] for stride in strides]
        self.channels = [scale_channels(BLOCKS[end][0], width) for end in self.ends]
        self.strides = list(strides)
        self.normalization = {"mean": [127.5] * 3, "std": [127.5] * 3}
        del self.blocks[self.ends[-1] + 1 :]
        frozen = [place for stride, place in ends.items() if stride <= 2**frozen_stages]
        self.freeze(
            [self.stem, *self.blocks[: frozen[-1] + 1]] if frozen else [],
            batch_norm=freeze_batch_norm,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> the maps of the strides asked for."""
        x = self.stem(x)
        maps = []
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place in self.ends:
                maps.append(x)
        return maps


class TorchvisionResNet(Backbone):
    """A ResNet of torchvision; its layers have torchvision's names, under `network`.

    Args:
        name: as `torchvision.models` has it.
        num_experts: of the last blocks; 1 builds the static network.
        num_conditional_blocks: how many; None takes the paper's 3.
        strides: of the maps to give, of 4, 8, 16 and 32.
        frozen_stages: layers up to the map of stride 2 ** frozen_stages keep their weights;
            torchvision trains its detectors with 2.
        freeze_batch_norm: batch norm keeps its weights and statistics.
    """

    def __init__(
        self,
        name: str,
        *,
        num_experts: int = 1,
        num_conditional_blocks: int | None = None,
        strides: Sequence[int] = (8, 16, 32),
        frozen_stages: int = 0,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        network = torchvision.models.get_model(name, weights=None)
        if not isinstance(network, ResNet):
            raise ValueError(f"{name} is no ResNet of torchvision: take it from timm")
        stages = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
        check_strides(name, list(stages), strides)
        self.name = name
        self.network = IntermediateLayerGetter(network, {stages[s]: str(s) for s in strides})
        self.strides = list(strides)
        self.channels = [_last_channels(self.network[stages[s]]) for s in strides]
        self.normalization = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        make_conditional(self.network, name, num_experts, num_conditional_blocks)
        groups = [{"conv1", "bn1"}, *({stage} for stage in stages.values())]
        frozen = set().union(*groups[:frozen_stages])
        self.freeze(
            [layer for own, layer in self.network.items() if own in frozen],
            batch_norm=freeze_batch_norm,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> the maps of the strides asked for."""
        return list(self.network(x).values())


class TimmBackbone(Backbone):
    """A network of timm that gives feature maps; its layers have timm's names, under `network`.

    timm's own CondConv networks, as `tf_efficientnet_cc_b0_8e`, run with the layers of `condconv`.

    Args:
        name: one of `timm.list_models()`. "hf-hub:" and "local-dir:" are refused: a checkpoint's
            config, which can come from anywhere, would have the network contacted or files read.
        num_experts: of the last blocks; 1 leaves the network as timm has it.
        num_conditional_blocks: how many; None takes the paper's number, where there is one.
        strides: of the maps to give.
        frozen_stages: layers up to the map of stride 2 ** frozen_stages keep their weights.
        freeze_batch_norm: batch norm keeps its weights and statistics.
    """

    def __init__(
        self,
        name: str,
        *,
        num_experts: int = 1,
        num_conditional_blocks: int | None = None,
        strides: Sequence[int] = (8, 16, 32),
        frozen_stages: int = 0,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if ":" in name:
            raise ValueError(f"name={name}: give a name of timm's own list, without a source")
        self.name = name
        self.network = create_timm_network(name, strides)
        self.strides = list(strides)
        self.channels = self.network.feature_info.channels()
        self.normalization = {
            key: [255 * value for value in self.network.pretrained_cfg[key]]
            for key in ("mean", "std")
        }
        make_conditional(self.network, name, num_experts, num_conditional_blocks)
        self.freeze(self._stages(frozen_stages), batch_norm=freeze_batch_norm)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> the maps of the strides asked for."""
        return self.network(x)

    def _stages(self, count: int) -> list[nn.Module]:
        """The layers up to the last map of a stride of at most 2 ** count."""
        ends = [
            info["module"]
            for info in self.network.feature_info.info
            if info["reduction"] <= 2**count
        ]
        if not ends:
            return []
        # timm registers layers in the order in which they run, and joins some names.
        names = [name for name, _ in self.network.named_modules()]
        end = next((end for end in (ends[-1], ends[-1].replace(".", "_")) if end in names), None)
        if end is None:
            raise ValueError(f"the stages of {self.name} cannot be told apart: set frozen_stages=0")
        last = max(place for place, name in enumerate(names) if f"{name}.".startswith(f"{end}."))
        return [
            self.network.get_submodule(name)
            for name in names[: last + 1]
            if name and not end.startswith(f"{name}.")
        ]


def create_timm_network(name: str, strides: Sequence[int], **options: Any) -> Any:
    """timm's network that gives the maps of these strides, finest first.

    Args:
        options: further arguments of `timm.create_model`.

    Raises:
        ValueError: where there is no such network, or it cannot give them.
    """
    reductions = [info["reduction"] for info in create_timm(name, features_only=True).feature_info]
    check_strides(name, reductions, strides)
    # Of several maps of a stride the last one has seen most.
    places = {stride: place for place, stride in enumerate(reductions)}
    network = create_timm(
        name, features_only=True, out_indices=[places[stride] for stride in strides], **options
    )
    if getattr(network, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(f"{name} gives feature maps with channels last")
    has_condconv = any(type(child).__name__ == "CondConv2d" for child in network.modules())
    return accelerate_timm(network) if has_condconv else network


def create_timm(name: str, **options: Any) -> Any:
    """`timm.create_model`, which raises whatever it likes, with one ValueError for all of it."""
    import timm  # takes seconds, and most detectors do without

    try:
        return timm.create_model(name, **options)
    except Exception as error:
        reason = first_line(error)
        raise ValueError(f"timm cannot make {name}: {reason}") from error


def check_strides(name: str, available: Iterable[int], strides: Sequence[int]) -> None:
    """Raise a ValueError where a network has no map of some stride, or they do not ascend."""
    known = sorted(set(available))
    absent = [stride for stride in strides if stride not in known]
    if absent or not strides or list(strides) != sorted(set(strides)):
        order = "" if absent or not strides else "; give them ascending, each once"
        raise ValueError(
            f"{name} has feature maps of the strides {', '.join(map(str, known))}: it cannot give "
            f"{', '.join(map(str, strides)) or 'none'}{order}"
        )


def make_conditional(
    network: nn.Module, name: str, num_experts: int, num_blocks: int | None
) -> None:
    """Make the last residual blocks of a new network conditional, each with one routing.

    Args:
        name: of the network, by which the paper's rule is found.
        num_blocks: None takes the paper's.

    Raises:
        ValueError: where the paper has no rule, or the blocks cannot be converted.
    """
    if num_experts == 1:
        return
    if num_blocks is None:
        num_blocks = next(
            (count for start, count in CONDITIONAL_BLOCKS.items() if name.startswith(start)), None
        )
    if num_blocks is None:
        raise ValueError(
            f"num_experts={num_experts}: which blocks of {name} are conditional is not known, "
            "set num_conditional_blocks"
        )
    blocks = _find_blocks(network)
    if not 0 < num_blocks <= len(blocks):
        raise ValueError(
            f"{num_blocks} blocks of {name} cannot be conditional: {len(blocks)} are found, which "
            "are looked for in nn.Sequential and nn.ModuleList; take fewer, or another network"
        )
    blocks = blocks[-num_blocks:]
    starts = tuple(f"{block}." for block in blocks)
    convert_to_condconv(
        network,
        num_experts,
        where=lambda own, _: own.startswith(starts) and not STATIC_PARTS.search(own),
        share_within=lambda own, _: own in blocks,
        from_scratch=True,
    )


def _find_blocks(parent: nn.Module, prefix: str = "") -> list[str]:
    """Names of the modules in rows of modules that have convolutions, first to last."""
    containers = (nn.Sequential, nn.ModuleList)
    blocks = []
    for name, child in parent.named_children():
        if (
            isinstance(parent, containers)
            and not isinstance(child, (*containers, nn.Conv2d))
            and any(isinstance(part, nn.Conv2d) for part in child.modules())
        ):
            blocks.append(prefix + name)
        else:
            blocks += _find_blocks(child, f"{prefix}{name}.")
    return blocks


def _last_channels(module: nn.Module) -> int:
    return [child.num_features for child in module.modules() if isinstance(child, nn.BatchNorm2d)][
        -1
    ]
