"""Weights of torchvision's RetinaNets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    RetinaNet_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)

from detection.errors import UserError

# torchvision's layer -> ours. Files of its first format number the towers' layers by twos, with
# the activations between, and have no ".0" behind a layer of the pyramid.
LAYERS = (
    (r"backbone\.body\.(.+)", r"backbone.network.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d+)(?:\.0)?", r"pyramid.laterals.\1.convs.0"),
    (r"backbone\.fpn\.layer_blocks\.(\d+)(?:\.0)?", r"pyramid.outputs.\1.convs.0"),
    (r"backbone\.fpn\.extra_blocks\.p6", "pyramid.extras.0.convs.0"),
    (r"backbone\.fpn\.extra_blocks\.p7", "pyramid.extras.1.convs.0"),
    (r"head\.classification_head\.conv\.(\d+)\.0", r"head.class_tower.\1.convs.0"),
    (r"head\.classification_head\.conv\.(\d+)\.1", r"head.class_tower.\1.norms.0"),
    (r"head\.classification_head\.cls_logits", "head.class_predictor.convs.0"),
    (r"head\.regression_head\.conv\.(\d+)\.0", r"head.box_tower.\1.convs.0"),
    (r"head\.regression_head\.conv\.(\d+)\.1", r"head.box_tower.\1.norms.0"),
    (r"head\.regression_head\.bbox_reg", "head.box_predictor.convs.0"),
)
OLD_TOWER = re.compile(r"(head\.\w+_head\.conv)\.(\d+)")
NORM_EPSILON = 1e-5  # of the backbone's batch norm, there and here
PUBLISHED: tuple[WeightsEnum, ...] = (
    RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
)


def load_torchvision_retinanet(
    weights: Mapping[str, Tensor], *, norm_epsilon: float = NORM_EPSILON
) -> dict[str, Tensor]:
    """State dict of our `RetinaNet` with a ResNet backbone, from one of torchvision's.

    Class slots are as there: the first is background, which torchvision trains for no object.

    Args:
        weights: of `retinanet_resnet50_fpn` or `_v2`.
        norm_epsilon: of the backbone's batch norm there; scales are adapted to ours.

    Raises:
        UserError: naming a parameter that is of no such network.
    """
    state = {}
    for name, tensor in weights.items():
        layer, _, parameter = name.rpartition(".")
        old = OLD_TOWER.fullmatch(layer)
        if old:
            layer = f"{old[1]}.{int(old[2]) // 2}.0"
        matches = ((re.fullmatch(pattern, layer), ours) for pattern, ours in LAYERS)
        ours = next((match.expand(ours) for match, ours in matches if match), None)
        if ours is None:
            raise UserError(f"{name} is of no RetinaNet of torchvision with a ResNet")
        state[f"{ours}.{parameter}"] = tensor.float() if tensor.is_floating_point() else tensor
    for name in [name for name in state if name.endswith(".running_var")]:
        layer = name.removesuffix(".running_var")
        # torchvision's frozen batch norm does not count batches.
        state.setdefault(f"{layer}.num_batches_tracked", torch.tensor(0))
        ratio = (state[name] + NORM_EPSILON) / (state[name] + norm_epsilon)
        if f"{layer}.weight" in state:
            state[f"{layer}.weight"] = state[f"{layer}.weight"] * ratio.sqrt()
    return state


def download_weights(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Published weights, from torchvision's cache where they are there already.

    Args:
        name: as "RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1".

    Returns:
        The state dict, as `load_torchvision_retinanet` gives it, and the names of its class slots.

    Raises:
        UserError: where there are none of this name, or they cannot be had.
    """
    weights = next((weights for weights in PUBLISHED if str(weights) == name), None)
    if weights is None:
        raise UserError(
            f"torchvision has no RetinaNet weights named {name}: "
            f"give {' or '.join(map(str, PUBLISHED))}"
        )
    return _convert(fetch_state(weights), weights)


def fetch_state(weights: WeightsEnum) -> dict[str, Tensor]:
    """What torchvision publishes, from its cache or downloaded.

    Raises:
        UserError: where it cannot be had.
    """
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download {weights.url}: {error}; fetch it elsewhere, and give the file"
        ) from error


def read_weights(path: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights from a file, as `download_weights` gives them; nameless slots have empty names.

    A file under its published name is taken for what was published, and 91 class slots for COCO's.

    Raises:
        UserError: naming a parameter that is of no RetinaNet of torchvision.
    """
    published = next((own for own in PUBLISHED if Path(own.url).name == path.name), None)
    if published is not None:
        return _convert(weights, published)
    state = load_torchvision_retinanet(weights)
    try:
        num_anchors = len(state["head.box_predictor.convs.0.bias"]) // 4
        num_slots = len(state["head.class_predictor.convs.0.bias"]) // num_anchors
    except KeyError as error:
        raise UserError(f"{path} is no RetinaNet of torchvision: {error} is missing") from error
    coco = list(PUBLISHED[0].meta["categories"])
    return state, coco if num_slots == len(coco) else [""] * num_slots


def _convert(
    state: Mapping[str, Tensor], weights: WeightsEnum
) -> tuple[dict[str, Tensor], list[str]]:
    # The first were trained with an epsilon of 0, and torchvision runs them so.
    epsilon = 0.0 if weights is PUBLISHED[0] else NORM_EPSILON
    return load_torchvision_retinanet(state, norm_epsilon=epsilon), list(weights.meta["categories"])
