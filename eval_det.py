"""Evaluate a checkpoint: `python eval_det.py checkpoint=FILE [data=...]`; see configs/eval.yaml.

A file of `python -m detection.export` is evaluated in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.cli import find_data, plain, run_script, split_data

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """The command `eval-det`."""
    run_script(evaluate_checkpoint, config_name="eval")


def evaluate_checkpoint(config: DictConfig) -> dict[str, Any]:
    """Measure a checkpoint on a split; print the table, write the numbers, detections, pictures.

    Args:
        config: composed from configs/eval.yaml.

    Returns:
        The metrics, as written to metrics.json.

    Raises:
        UserError: where the config, the checkpoint or the data is wrong.
    """
    from rich.console import Console

    from detection.build import build
    from detection.checkpoint import load_checkpoint, load_model, read_categories
    from detection.data.sources import find_split, load_split
    from detection.detector import Detector
    from detection.engine.evaluate import evaluate, evaluate_exported
    from detection.engine.processes import join_processes
    from detection.engine.run_folder import LOGGER, start_logging
    from detection.errors import UserError
    from detection.evaluation.coco import (
        CocoEvaluator,
        metrics_table,
        write_metrics,
        write_results,
    )
    from detection.onnx_detector import OnnxDetector
    from detection.visualization.results import draw_results

    content = plain(config)
    console = Console()
    if content["checkpoint"] is None:
        raise UserError("checkpoint is not set: give checkpoint=FILE, as train_det.py writes it")
    path = Path(content["checkpoint"])
    exported = OnnxDetector.from_file(path) if path.suffix == ".onnx" else None
    checkpoint = {"config": {}} if exported else load_checkpoint(path)
    source, _ = split_data(find_data(content, checkpoint))

    with join_processes(content["device"]) as processes:
        index = load_split(find_split(build(source), content["split"]))
        name = path.name if exported else path.stem
        output = Path(content["output"] or path.with_name(f"{name}-{content['split']}"))
        start_logging(console, None, is_main=processes.is_main)
        for line in [f"{len(index)} images of {index.annotations_file}", *index.describe()]:
            LOGGER.info(line)

        evaluator = CocoEvaluator(index.ground_truth())
        batch_size = content["evaluation"]["batch_size"]
        if exported:
            found = evaluate_exported(exported, index, evaluator, batch_size=batch_size)
        else:
            parts = load_model(checkpoint, weights=content["weights"])
            found = evaluate(
                Detector(parts, read_categories(checkpoint), processes.device),
                index,
                evaluator,
                processes=processes,
                criterion=parts.criterion,
                batch_size=batch_size,
                num_workers=content["evaluation"]["num_workers"],
            )
            assert found is not None  # nothing told it to stop
        if processes.is_main:
            write_metrics(found.metrics, output / "metrics.json")
            write_results(found.results, output / "detections.json")
            draw_results(
                index,
                found.results,
                output / "visualizations",
                num_pictures=content["evaluation"]["num_pictures"],
                score_threshold=content["evaluation"]["picture_score_threshold"],
            )
            console.print(metrics_table(found.metrics))
            LOGGER.info("metrics, detections and pictures: %s", output)
    return found.metrics


if __name__ == "__main__":
    main()
