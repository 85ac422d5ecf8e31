"""`python -m detection.export checkpoint=FILE format=onnx|openvino|torch_export output=FILE`.

configs/export.yaml has the keys.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.cli import run_script
from detection.config import find_data, plain

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from detection.data.coco import CocoIndex

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch_export": ".pt2"}
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
    from detection.files import check_folder

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
    check_folder(path.parent)
    if content["quantize"] and (content["format"], content["outputs"]) != ("onnx", "detections"):
        raise UserError("quantize=true is for format=onnx outputs=detections")
    if content["num_samples"] < 1:
        raise UserError(f"num_samples={content['num_samples']}: give at least 1")

    from detection.checkpoint import load_checkpoint, load_model, read_categories
    from detection.export.formats import (
        ExportedDetector,
        describe,
        export_onnx,
        export_openvino,
        export_torch,
    )
    from detection.export.quantization import quantize_onnx

    checkpoint = load_checkpoint(content["checkpoint"])
    categories = read_categories(checkpoint)
    parts = load_model(checkpoint, weights=content["weights"])
    detector = ExportedDetector(parts, images=content["images"], outputs=content["outputs"])
    metadata = describe(detector, categories, license=content["license"])
    measured: dict[str, float] = {}
    data = None
    if content["specialize"] or content["quantize"]:
        data = _Data(find_data(content, checkpoint), parts.preprocess, content["num_samples"])
        measured["checkpoint"] = data.measure(parts, categories)
    if data and content["specialize"]:
        _specialize(parts.network, parts.preprocess, data.samples)
        measured["specialized"] = data.measure(parts, categories)
        metadata["specialized"] = "true"

    if data and content["quantize"]:
        batches = list(data.samples.split(1))
        if content["images"] == "float32":
            batches = [parts.preprocess(batch) for batch in batches]
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "float.onnx"
            export_onnx(detector, metadata, exported)
            measured["exported"] = data.measure_file(exported)
            count = quantize_onnx(
                exported,
                [batch.numpy() for batch in batches],
                path,
                experts=content["quantize_experts"],
            )
        print(f"{count} convolutions in INT8, calibrated on {len(batches)} images")
        measured["quantized"] = data.measure_file(path)
    else:
        write = {"onnx": export_onnx, "openvino": export_openvino, "torch_export": export_torch}
        write[content["format"]](detector, metadata, path)
    side = metadata["input_size"]
    files = {path, path.with_suffix(".bin")} if path.suffix == ".xml" else {path}
    size = sum(file.stat().st_size for file in files)
    print(
        f"wrote {path}: {size / 1e6:.1f} MB, {content['images']} images "
        f"(batch, 3, {side}, {side}) to {content['outputs']}"
    )
    for name, value in measured.items():
        print(f"AP {name:12} {value:.4f} {value - measured['checkpoint']:+.4f}")
    return path


def _specialize(network: Any, preprocess: Any, samples: torch.Tensor) -> None:
    from condconv import specialize
    from detection.errors import UserError

    try:
        summaries = specialize(network, (preprocess(part) for part in samples.split(8)))
    except ValueError as error:
        raise UserError(f"specialize=true: {error}") from error
    print(f"routing over {len(samples)} images, standard deviation of the weights of the experts:")
    for name, summary in summaries.items():
        print(f"  {name:36} mean {_mean(summary.deviation):.3f}, most {max(summary.deviation):.3f}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class _Data:
    """The images to calibrate and to measure with."""

    def __init__(self, config: dict[str, Any], preprocess: Any, num_samples: int) -> None:
        from detection.build import build
        from detection.data.sources import data_source, load_split

        splits = build(data_source(config))
        self.val = load_split(splits.val)
        # What is measured on is not calibrated on, where there is a choice.
        train = self.val if splits.train is None else load_split(splits.train)
        self.samples = _read_samples(train, preprocess, num_samples)

    def measure(self, parts: Any, categories: Any) -> float:
        """AP of a network on the validation split."""
        from detection.detector import Detector
        from detection.engine.evaluate import evaluate
        from detection.engine.processes import join_processes
        from detection.evaluation.coco import CocoEvaluator

        with join_processes("cpu") as processes:
            evaluator = CocoEvaluator(self.val.ground_truth())
            detector = Detector(parts, categories)
            found = evaluate(detector, self.val, evaluator, processes=processes, num_workers=0)
        assert found is not None  # nothing told it to stop
        return found.metrics["AP"]

    def measure_file(self, path: Path) -> float:
        """AP of an ONNX file on the validation split."""
        from detection.engine.evaluate import evaluate_exported
        from detection.evaluation.coco import CocoEvaluator
        from detection.onnx_detector import OnnxDetector

        evaluator = CocoEvaluator(self.val.ground_truth())
        found = evaluate_exported(OnnxDetector.from_file(path), self.val, evaluator)
        return found.metrics["AP"]


def _read_samples(index: CocoIndex, preprocess: Any, number: int) -> torch.Tensor:
    """uint8 (N, 3, S, S), spread evenly over a split.

    Raises:
        UserError: where none can be read.
    """
    import torch

    from detection.data.dataset import DetectionDataset
    from detection.data.sampler import spread
    from detection.data.transforms import EvalTransform
    from detection.errors import UserError

    transform = EvalTransform(resize=preprocess.resize)
    dataset = DetectionDataset(index, transform, seed=0, training=False)
    images = []
    for i in spread(len(index), number):
        sample = dataset[i]
        if sample.unreadable:
            print(f"cannot read {sample.unreadable[0]}: left out")
        else:
            images.append(sample.image)
    if not images:
        raise UserError(
            f"{index.annotations_file}: none of the images to calibrate with can be read"
        )
    return torch.stack(images)


if __name__ == "__main__":
    main()
