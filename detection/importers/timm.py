"""Weights of timm's MobileNetV1."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from condconv.backbones import MobileNetV1
from detection.checkpoint import load_weights
from detection.errors import UserError

TIMM_EPSILON = 1e-5
# timm's layer -> ours.
STEM = {"conv_stem": "stem.conv", "bn1": "stem.norm"}
BLOCK = {
    "conv_dw": "depthwise.conv",
    "bn1": "depthwise.norm",
    "conv_pw": "pointwise.conv",
    "bn2": "pointwise.norm",
}


def load_timm_mobilenet_v1(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a static `condconv.backbones.MobileNetV1` from timm's `mobilenetv1_100`.

    timm normalises these networks' images as the detectors here do (mean and deviation 0.5), but
    two things differ. Its batch norm has epsilon 1e-5: the scales are adapted, so that the function
    stays the same. And it pads every side by 1, which is right for these weights, where "SAME"
    padding does so only if a layer's input has an odd size: on an even one, stride 2 samples one
    pixel further right and down. Features are then those of a slightly shifted image with another
    border: a fit start for training, not timm's own classifier to the digit.

    The classifier's weights are left out; `mobilenetv1_125` (width 1.25) fits likewise.

    Raises:
        UserError: naming what is missing, left over, or of another shape.
    """
    matches = [re.match(r"blocks\.(\d+)\.(\d+)\.", name) for name in weights]
    places = sorted({(int(match[1]), int(match[2])) for match in matches if match})
    layers = dict(STEM)
    for number, (stage, place) in enumerate(places):
        for theirs, ours in BLOCK.items():
            layers[f"blocks.{stage}.{place}.{theirs}"] = f"blocks.{number}.layers.{ours}"

    state, last = {}, None
    for name, tensor in weights.items():
        layer, _, parameter = name.rpartition(".")
        if layer == "classifier":
            continue
        if layer not in layers:
            raise UserError(f"{name} is left over: only timm's mobilenetv1_100 and _125 fit here")
        state[f"{layers[layer]}.{parameter}"] = tensor.float()
        last = tensor if layer.endswith("conv_pw") else last
    if last is None:
        raise UserError("there is no conv_pw.weight: are these the weights of timm's MobileNetV1?")
    backbone = MobileNetV1(width=last.shape[0] / 1024)
    load_weights(backbone, state)
    state = backbone.state_dict()
    for name in [name for name in state if name.endswith("norm.weight")]:
        variance = state[name.replace("weight", "running_var")]
        state[name] *= ((variance + backbone.stem.norm.eps) / (variance + TIMM_EPSILON)).sqrt()
    return state
