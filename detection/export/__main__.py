"""`python -m detection.export checkpoint=FILE format=onnx|torch_export output=FILE`.

configs/export.yaml has the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from detection.cli import plain, run_script

if TYPE_CHECKING:
    from omegaconf import DictConfig

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
CHOICES = {
    "format": tuple(SUFFIXES),
    "weights": ("ema", "model"),
    "images": ("uint8", "float32"),
    "outputs": ("detections", "raw"),
}


def main() -> None:
    """The command line."""
    run_script(export, config_name="export")


def export(config: DictConfig) -> Path:
    """Write a checkpoint's detector as a file for other runtimes.

    Args:
        config: composed from configs/export.yaml.

    Returns:
        The file written.

    Raises:
        UserError: where the config or the checkpoint is wrong.
    """
    from detection.errors import UserError

    content = plain(config)
    for key, choices in CHOICES.items():
        if content[key] not in choices:
            raise UserError(f"{key}={content[key]}: give one of {', '.join(choices)}")
    if content["checkpoint"] is None:
        raise UserError("checkpoint is not set: give checkpoint=FILE, as train_det.py writes it")
    suffix = SUFFIXES[content["format"]]
    path = Path(content["output"] or Path(content["checkpoint"]).with_suffix(suffix))
    if path.suffix != suffix:
        raise UserError(f"output={path}: a file of format={content['format']} ends in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"output={path}: there is no folder {path.parent}")

    from detection.checkpoint import load_checkpoint, load_model, read_categories
    from detection.export.formats import ExportedDetector, describe, export_onnx, export_torch

    checkpoint = load_checkpoint(content["checkpoint"])
    detector = ExportedDetector(
        load_model(checkpoint, weights=content["weights"]),
        images=content["images"],
        outputs=content["outputs"],
    )
    metadata = describe(detector, read_categories(checkpoint), license=content["license"])
    write = {"onnx": export_onnx, "torch_export": export_torch}[content["format"]]
    write(detector, metadata, path)
    side = metadata["input_size"]
    print(
        f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, {content['images']} images "
        f"(batch, 3, {side}, {side}) to {content['outputs']}"
    )
    return path


if __name__ == "__main__":
    main()
