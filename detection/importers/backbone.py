"""Start a backbone, static or conditional, from a static network's weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn

from condconv import spread_over_experts
from detection.checkpoint import load_weights
from detection.errors import UserError
from detection.importers.tensorflow import load_slim_mobilenet_v1, read_variables
from detection.importers.timm import load_timm_mobilenet_v1


def load_backbone(
    backbone: nn.Module,
    path: str | Path,
    *,
    delta: float = 0.2,
    generator: torch.Generator | None = None,
) -> None:
    """Load ImageNet weights of MobileNetV1 into `condconv.backbones.MobileNetV1`, in place.

    Args:
        backbone: static, or with experts, which then start as in `spread_over_experts`.
        path: timm's weights where it ends in .pt or .pth (the `state_dict()` of its
            `mobilenetv1_100`, written by `torch.save`), else TF-slim's, as `read_variables` takes
            them.
        delta: as in `spread_over_experts`.
        generator: of the experts' differences; None takes the default one.

    Raises:
        UserError: where the file cannot be read or holds another network.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth"):
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
        state = load_timm_mobilenet_v1(weights)
    else:
        state = load_slim_mobilenet_v1(read_variables(path))
    load_weights(backbone, spread_over_experts(state, backbone, delta=delta, generator=generator))
