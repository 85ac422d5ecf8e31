"""Start a detector, static or conditional, from another one's weights.

Shapes: A anchors of a cell, S class slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from detection.checkpoint import load_checkpoint, read_categories
from detection.errors import UserError
from detection.importers.backbone import (
    find_weights,
    load_backbone,
    load_static_weights,
    read_state,
)
from detection.importers.torchvision import download_weights, read_weights
from detection.models.retinanet import RetinaNet
from detection.models.ssd import SSD
from detection.structures import Category

DOWNLOAD = "torchvision:"
# Slots of no class, here and in torchvision's lists.
NAMELESS = {"", "__background__", "N/A"}


def start_detector(
    network: nn.Module,
    categories: Sequence[Category],
    *,
    weights: str | None,
    backbone_weights: str | None,
) -> list[str]:
    """Load what a run starts from: all of a detector, its backbone, or nothing.

    Args:
        weights: as `load_detector` takes it.
        backbone_weights: as `load_backbone` takes it.

    Returns:
        What was loaded, a printable line each.

    Raises:
        UserError: where both are given, cannot be had, or do not fit.
    """
    if weights is not None and backbone_weights is not None:
        raise UserError("model.weights has a backbone too: leave it out, or backbone_weights")
    assert isinstance(network, (SSD, RetinaNet))
    if weights is not None:
        return load_detector(network, weights, categories)
    if backbone_weights is not None:
        load_backbone(network.backbone, backbone_weights)
        return [f"the backbone starts from {backbone_weights}"]
    return []


def load_detector(
    network: SSD | RetinaNet,
    source: str | Path,
    categories: Sequence[Category],
    *,
    delta: float = 0.2,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Load a detector's weights, in place; the class layer by the names of the classes.

    It keeps what the source knows of classes of the same names, and starts anew for others. Static
    weights become experts as in `spread_over_experts`: a conditional network first computes what
    the static one does.

    Args:
        network: of the source's form; it may have other classes, another input size, and experts
            where the source has none.
        source: "torchvision:NAME", as `download_weights` takes it; or a file, a checkpoint of this
            project or the state dict of a RetinaNet of torchvision.
        categories: the network's; a class's place is its label.
        delta: as in `spread_over_experts`.
        generator: of the experts' differences; None takes the default one.

    Returns:
        What was kept, what starts anew and what is left out, a printable line each.

    Raises:
        UserError: where the source cannot be had, or its weights do not fit.
    """
    state, slot_names = _read(str(source), network.num_background)
    labels = {category.name: label for label, category in enumerate(categories)}
    # The source's slot of each slot that is kept.
    kept = {slot: slot for slot in range(network.num_background)}
    kept |= {
        network.num_background + labels[name]: slot
        for slot, name in enumerate(slot_names)
        if name in labels
    }
    own = network.state_dict()
    num_own = network.num_background + network.num_classes
    for layer in network.class_layers:
        for key, axis in ((f"{layer}.weight", -4), (f"{layer}.bias", -1)):
            if key in state:
                state[key] = _fit_classes(
                    state[key], own[key], axis, kept, (len(slot_names), num_own)
                )
    load_static_weights(network, state, delta=delta, generator=generator)

    known = [category.name for category in categories if category.name in slot_names]
    new = [category.name for category in categories if category.name not in slot_names]
    dropped = [name for name in slot_names if name not in NAMELESS and name not in labels]
    return [
        f"the detector starts from {source}",
        f"classes it keeps ({len(known)}): {_join(known)}",
        f"classes that start anew ({len(new)}): {_join(new)}",
        f"classes of it that the data lacks ({len(dropped)}): {_join(dropped)}",
    ]


def _read(source: str, num_background: int) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict in our names, and the class names of its slots, empty where there is none."""
    if source.startswith(DOWNLOAD):
        return download_weights(source.removeprefix(DOWNLOAD))
    content = read_state(Path(source))
    if "categories" not in content:
        return read_weights(Path(source), find_weights(source, content))
    checkpoint = load_checkpoint(source)
    names = [category.name for category in read_categories(checkpoint)]
    return dict(checkpoint["ema"] or checkpoint["model"]), [""] * num_background + names


def _fit_classes(
    theirs: Tensor, own: Tensor, axis: int, kept: Mapping[int, int], num_slots: tuple[int, int]
) -> Tensor:
    """Parameters of a class layer: our own, with the source's in the slots that are kept.

    Where the shapes do not allow it, the source's as they are, for `load_weights` to name.

    Args:
        axis: of the outputs (A * S), from the end: experts have one more in front.
        kept: the source's slot of each of ours.
        num_slots: the source's and ours.
    """
    own = own[0] if own.dim() > theirs.dim() else own  # one expert's start is that of all
    # Outputs first, then slots first.
    ours, source = own.movedim(axis, 0), theirs.movedim(axis, 0)
    if ours.shape[1:] != source.shape[1:] or len(source) * num_slots[1] != len(ours) * num_slots[0]:
        return theirs
    ours, source = (
        outputs.unflatten(0, (-1, slots)).transpose(0, 1)
        for outputs, slots in zip((ours, source), reversed(num_slots), strict=True)
    )
    ours = ours.clone()
    ours[list(kept.keys())] = source[list(kept.values())]
    return ours.transpose(0, 1).flatten(0, 1).movedim(0, axis).contiguous()


def _join(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
