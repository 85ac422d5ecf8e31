"""Start a backbone, static or conditional, from a static network's weights."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from condconv import CondConv2d, Router
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


def spread_over_experts(
    state: Mapping[str, Tensor],
    network: nn.Module,
    *,
    delta: float = 0.2,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The state dict of a conditional network that computes what a static one does.

    Each of E experts is W / sqrt(E) plus a random difference, and the differences of all experts
    sum to zero. Every router starts at weight 0 and bias -ln(sqrt(E) - 1), so that each routing
    weight is 1 / sqrt(E) and the mixture is W. The experts differ from the first step on, and so
    the routers learn.

    Args:
        state: the state dict of the static network of the same form.
        network: the conditional network; a static one gets the state as it is.
        delta: size of the differences relative to W / sqrt(E), per output channel.
        generator: of the differences; None takes the default one.
    """
    spread = dict(state)
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, CondConv2d):
            for key in (f"{prefix}weight", f"{prefix}bias"):
                if key in state:
                    spread[key] = _spread(state[key], module.num_experts, delta, generator)
        elif isinstance(module, Router):
            num_experts = module.linear.out_features
            spread[f"{prefix}linear.weight"] = torch.zeros_like(module.linear.weight)
            spread[f"{prefix}linear.bias"] = torch.full_like(
                module.linear.bias, -math.log(math.sqrt(num_experts) - 1)
            )
    return spread


def _spread(
    static: Tensor, num_experts: int, delta: float, generator: torch.Generator | None
) -> Tensor:
    base = static / math.sqrt(num_experts)
    noise = torch.randn(num_experts, *static.shape, generator=generator)
    # One expert's share of a centred sum is a little less than the whole.
    noise = (noise - noise.mean(dim=0)) * math.sqrt(num_experts / (num_experts - 1))
    size = base.flatten(1).square().mean(dim=1).sqrt() if base.dim() > 1 else base.abs()
    return base + delta * noise * size.view(-1, *[1] * (base.dim() - 1))
