"""Checkpoint files: all that is needed to predict, or to go on training.

A checkpoint is a dict that `torch.load(weights_only=True)` reads: `version`, `model` (state dict),
`ema` (state dict or None), `config` (the whole config as plain containers), `categories` (list of
[id, name]), and, where training wrote it, `step` and the training state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

import torch
from torch import Tensor, nn

from detection.build import ModelParts, build_model
from detection.errors import UserError
from detection.structures import Category

VERSION = 1


def save_checkpoint(
    path: str | Path,
    *,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    categories: Sequence[Category],
    ema: Mapping[str, Tensor] | None = None,
    **training_state: Any,
) -> None:
    """Write a checkpoint; the file at `path` is always a whole one, the old or the new.

    Args:
        config: plain containers, with the `model` section that `build_model` takes.
        training_state: tensors and plain values, kept as they are.
    """
    path = Path(path)
    content = {
        "version": VERSION,
        "model": dict(model),
        "ema": None if ema is None else dict(ema),
        "config": dict(config),
        "categories": [[category.id, category.name] for category in categories],
        **training_state,
    }
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: where the file is missing, damaged or no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The readers answer a broken file with almost any exception.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint: {reason}") from error
    needed = {"version", "model", "config", "categories"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise UserError(f"{path} is no checkpoint of this project: train_det.py writes them")
    if content["version"] != VERSION:
        raise UserError(
            f"{path} has checkpoint version {content['version']}, this program reads {VERSION}"
        )
    return content


def read_categories(checkpoint: Mapping[str, Any]) -> tuple[Category, ...]:
    """The category table; a class's place in it is its label."""
    return tuple(Category(id, name) for id, name in checkpoint["categories"])


def load_model(
    checkpoint: Mapping[str, Any], *, weights: Literal["ema", "model"] = "ema"
) -> ModelParts:
    """Rebuild a checkpoint's detector.

    Args:
        weights: the moving average where the checkpoint has one, or the trained weights.
    """
    parts = build_model(checkpoint["config"]["model"], len(checkpoint["categories"]))
    state = checkpoint.get("ema") if weights == "ema" else None
    load_weights(parts.network, state or checkpoint["model"])
    return parts


def load_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        UserError: naming what is missing, left over, or of another shape.
    """
    own = network.state_dict()
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is left over" for name in state if name not in own]
    faults += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"the weights are of another model: {'; '.join(faults[:3])}{more}")
    network.load_state_dict(dict(state))
