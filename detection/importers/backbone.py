"""Start a backbone, static or conditional, from a static network's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from condconv import spread_over_experts
from detection.checkpoint import load_weights
from detection.errors import UserError, first_line
from detection.importers.tensorflow import load_slim_mobilenet_v1, read_variables
from detection.importers.timm import load_timm_mobilenet_v1
from detection.importers.torchvision import fetch_state
from detection.models.backbones import (
    TimmBackbone,
    TorchvisionResNet,
    create_timm,
    create_timm_network,
)

PRETRAINED = "pretrained"
# Of MobileNetV1 and of torchvision's ResNets; a backbone ends with its last map.
STAGE = re.compile(r"blocks\.\d+\.|network\.layer[1-4]\.")


def load_backbone(
    backbone: nn.Module,
    source: str | Path,
    *,
    delta: float = 0.2,
    generator: torch.Generator | None = None,
) -> None:
    """Load ImageNet weights into a backbone, in place.

    Args:
        backbone: MobileNetV1, `TorchvisionResNet` or `TimmBackbone`; static, or with experts, which
            then start as in `spread_over_experts`.
        source: "pretrained" for those that timm or torchvision publish, downloaded where they are
            not in the cache; or a file. For MobileNetV1 one of timm's where it ends in .pt or .pth
            (the `state_dict()` of its `mobilenetv1_100`, written by `torch.save`), else TF-slim's,
            as `read_variables` takes them; for others one of timm's or torchvision's own.
        delta: as in `spread_over_experts`.
        generator: of the experts' differences; None takes the default one.

    Raises:
        UserError: where the weights cannot be had or are of another network.
    """
    if isinstance(backbone, TorchvisionResNet):
        state = _read_torchvision(backbone.name, source)
    elif isinstance(backbone, TimmBackbone):
        state = _read_timm(backbone, source)
    elif source == PRETRAINED:
        state = load_timm_mobilenet_v1(_download_timm("mobilenetv1_100"))
    elif Path(source).suffix in (".pt", ".pth"):
        state = load_timm_mobilenet_v1(_read_backbone_state(source))
    else:
        state = load_slim_mobilenet_v1(read_variables(source))
    beyond = tuple(_list_stages(state) - _list_stages(backbone.state_dict()))
    state = {key: tensor for key, tensor in state.items() if not key.startswith(beyond)}
    load_static_weights(backbone, state, delta=delta, generator=generator)


def _list_stages(state: Mapping[str, Tensor]) -> set[str]:
    return {match[0] for match in map(STAGE.match, state) if match}


def load_static_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    delta: float,
    generator: torch.Generator | None,
) -> None:
    """Load a state dict that must fit, once its static kernels are spread over experts.

    Args:
        network: static or conditional; what is of its shape already is loaded as it is.
        delta: as in `spread_over_experts`.
        generator: as in `spread_over_experts`.

    Raises:
        UserError: naming what is missing, left over, or of another shape.
    """
    own = network.state_dict()
    spread = spread_over_experts(state, network, delta=delta, generator=generator)
    spread |= {key: t for key, t in state.items() if key in own and own[key].shape == t.shape}
    load_weights(network, spread)


def read_state(path: str | Path) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU.

    Raises:
        UserError: where it cannot be read, or is no dictionary.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler answers another file with almost any
        reason = first_line(error)
        raise UserError(
            f"cannot read {path}, it is damaged or holds no weights: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights by name, but a {type(content).__name__}")
    return content


def find_weights(path: str | Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in what a training script has saved, in float32.

    They may lie under "state_dict" or "model"; what DataParallel puts before their names is left
    out; batch norm of before torch 0.4.1, which did not count its batches, gets a count of 0.

    Raises:
        UserError: where something else than a tensor is among them.
    """
    content = next((content[key] for key in ("state_dict", "model") if key in content), content)
    state = {}
    for name, tensor in content.items() if isinstance(content, Mapping) else [("", content)]:
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path} holds no weights by name: {name!r} is a {type(tensor).__name__}"
            )
        state[name] = tensor.float() if tensor.is_floating_point() else tensor
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for name in [name for name in state if name.endswith(".running_mean")]:
        counter = name.replace("running_mean", "num_batches_tracked")
        state.setdefault(counter, torch.tensor(0))
    return state


def _read_backbone_state(path: str | Path) -> dict[str, Tensor]:
    content = read_state(path)
    if "categories" in content:
        raise UserError(f"{path} is a checkpoint of a whole detector: give model.weights={path}")
    return find_weights(path, content)


def _download_timm(name: str) -> dict[str, Tensor]:
    try:
        return create_timm(name, pretrained=True).state_dict()
    except ValueError as error:
        raise UserError(f"backbone_weights={PRETRAINED}: {error}") from error


def _read_torchvision(name: str, source: str | Path) -> dict[str, Tensor]:
    if source == PRETRAINED:
        state = find_weights(name, fetch_state(get_model_weights(name)["DEFAULT"]))
    else:
        state = _read_backbone_state(source)
    return {f"network.{key}": tensor for key, tensor in state.items() if not key.startswith("fc.")}


def _read_timm(backbone: TimmBackbone, source: str | Path) -> dict[str, Tensor]:
    options: dict[str, Any] = {"pretrained": True}
    if source != PRETRAINED:
        # timm takes what fits of a state dict, and is silent about the rest.
        whole = create_timm(backbone.name)
        head = f"{whole.pretrained_cfg['classifier']}."
        own = {key: t for key, t in whole.state_dict().items() if key.startswith(head)}
        body = {
            key: t for key, t in _read_backbone_state(source).items() if not key.startswith(head)
        }
        load_weights(whole, body | own)
        options["pretrained_cfg_overlay"] = {"state_dict": whole.state_dict()}
    try:
        network = create_timm_network(backbone.name, backbone.strides, **options)
    except ValueError as error:
        raise UserError(f"backbone_weights={source}: {error}") from error
    return {f"network.{key}": tensor for key, tensor in network.state_dict().items()}
