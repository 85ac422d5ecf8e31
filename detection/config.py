"""Composed configs: as plain containers, and their sections laid over those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detection.errors import UserError, first_line


def config_dir() -> Path:
    """Where the configs lie: beside the scripts in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "configs"
    return checkout if (checkout / "train.yaml").is_file() else package / "configs"


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain containers, interpolations resolved.

    Raises:
        UserError: where a value is missing or cannot be resolved.
    """
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def find_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section; without a network it is laid over that of its checkpoint.

    Raises:
        UserError: where there is no such checkpoint, or a key that would have no effect.
    """
    if "_target_" in config:
        return dict(config)
    # Heavy, and most runs do without.
    from detection.build import SHORTHANDS
    from detection.checkpoint import load_checkpoint
    from detection.importers.detector import DOWNLOAD

    if config["weights"] is None:
        raise UserError("no model: give model.weights=FILE, a checkpoint, or choose a model")
    if str(config["weights"]).startswith(DOWNLOAD):
        raise UserError(f"{config['weights']} names no model: give model=retinanet as well")
    for key in sorted(SHORTHANDS & config.keys()):
        remedy = "give +model.backbone.num_experts=..." if key == "num_experts" else "leave it out"
        raise UserError(f"model.{key} is fixed in a checkpoint: {remedy}")
    saved = load_checkpoint(config["weights"])["config"]["model"]
    return _merge({**saved, "num_classes": None}, config)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections laid over sections; OmegaConf would resolve what a checkpoint has in its strings."""
    sections = [key for key in above if isinstance(below.get(key), Mapping)]
    return {**below, **above, **{key: _merge(below[key], above[key]) for key in sections}}


def find_data(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` section to evaluate on: the one chosen now, else the checkpoint's own.

    Raises:
        UserError: where there is neither, or the checkpoint's names another source than ours.
    """
    if config.get("data"):
        return config["data"]
    data = checkpoint["config"].get("data")
    if data is None:
        raise UserError(
            "the checkpoint names no data: give data=coco data.root=DIR, or data=custom "
            "data.val.images=DIR data.val.annotations=FILE"
        )
    # Here and not above: torch takes seconds to import.
    from detection.build import DATA_TARGETS, check_targets
    from detection.data.sources import data_source

    check_targets(data_source(data), DATA_TARGETS, "checkpoint's data")
    return data
