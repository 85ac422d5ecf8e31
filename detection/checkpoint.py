"""Checkpoint files: all that is needed to predict, or to go on training.

A checkpoint is a dict that `torch.load(weights_only=True)` reads: `version`, `model` (state dict),
`ema` (state dict or None), `config` (the whole config as plain containers), `categories` (list of
[id, name]), and, where training wrote it, `step` and the training state.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

import torch
from torch import Tensor, nn

from detection.build import ModelParts, build_model
from detection.errors import UserError, first_line
from detection.structures import Category

VERSION = 1


class DamagedCheckpoint(UserError):
    """A file that is not as it was written: cut short, or with other bytes."""


def save_checkpoint(
    path: str | Path,
    *,
    keep_old_as: Path | None = None,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    categories: Sequence[Category],
    ema: Mapping[str, Tensor] | None = None,
    **training_state: Any,
) -> None:
    """Write a checkpoint; where that fails, the old one at `path` is untouched.

    Args:
        keep_old_as: where the old one goes, in the same folder; None replaces it. A process killed
            in between leaves none at `path`.
        config: plain containers, with the `model` section that `build_model` takes.
        training_state: tensors and plain values, kept as they are.

    Raises:
        UserError: where the file cannot be written.
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
        if keep_old_as is not None and path.exists():
            path.replace(keep_old_as)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        if keep_old_as is not None and keep_old_as.exists() and not path.exists():
            keep_old_as.replace(path)
        # torch raises it wherever the main thread is when a worker dies; the writer adds its own.
        cause: BaseException | None = error
        while cause is not None:
            if str(cause).startswith("DataLoader worker"):
                raise cause from None
            cause = cause.__context__
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write {path}: {reason}; the file that was there is untouched: "
            "make room, then go on"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        DamagedCheckpoint: where the file is not as it was written.
        UserError: where it is missing, cannot be read, or is no checkpoint of this project.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        raise UserError(
            f"{path}: give a checkpoint of train_det.py; only eval_det.py and OnnxDetector take "
            "exported files"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    _check_whole(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    needed = {"version", "model", "config", "categories"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise UserError(f"{path} is no checkpoint of this project: train_det.py writes them")
    if content["version"] != VERSION:
        raise UserError(
            f"{path} has checkpoint version {content['version']}, this program reads {VERSION}"
        )
    return content


def _check_whole(path: Path) -> None:
    """Compares the checksums, which torch writes and does not read."""
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # zipfile answers a broken file with almost any exception
        raise DamagedCheckpoint(f"{path} is damaged or no checkpoint: {error}") from error
    if damaged is not None:
        raise DamagedCheckpoint(f"{path} is damaged: {damaged} is not as it was written")


def read_categories(checkpoint: Mapping[str, Any]) -> tuple[Category, ...]:
    """The category table; a class's place in it is its label."""
    return tuple(Category(id, name) for id, name in checkpoint["categories"])


def load_model(
    checkpoint: Mapping[str, Any], *, weights: Literal["ema", "model"] = "ema"
) -> ModelParts:
    """Rebuild a checkpoint's detector, its network laid out channels last.

    That is how a run evaluates it by default, so that its figures are found again to the bit, and a
    CPU has it so up to 1.4 times as fast.

    Args:
        weights: the moving average where the checkpoint has one, or the trained weights.
    """
    config, num_classes = checkpoint["config"]["model"], len(checkpoint["categories"])
    parts = build_model(config, num_classes, initialize=False)
    state = checkpoint.get("ema") if weights == "ema" else None
    load_weights(parts.network, state or checkpoint["model"])
    parts.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return parts


def load_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that must fit exactly; a network on the meta device comes to its device.

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
    assign = any(tensor.is_meta for tensor in own.values())
    if assign:  # the network takes the tensors themselves, and the state may serve another one too
        state = {name: state[name].to(tensor.dtype, copy=True) for name, tensor in own.items()}
    network.load_state_dict(dict(state), assign=assign)
