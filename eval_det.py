"""Evaluate a checkpoint: `python eval_det.py checkpoint=FILE [data=...]`; see configs/eval.yaml.

A file of `python -m detection.export` is evaluated in the same way. `compare=FILE` evaluates a
second one, and `report=true` writes a page about it all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.cli import run_script
from detection.config import find_data, plain

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from detection.data.coco import CocoIndex
    from detection.detector import Detector
    from detection.engine.evaluate import Evaluation
    from detection.evaluation.coco import CocoEvaluator
    from detection.onnx_detector import OnnxDetector
    from detection.report import Section


def main() -> None:
    """The command `eval-det`."""
    run_script(evaluate_checkpoint, config_name="eval", folder="output")


def evaluate_checkpoint(config: DictConfig) -> dict[str, Any]:
    """Measure a checkpoint on a split; print the table, write the numbers, detections, pictures.

    Args:
        config: composed from configs/eval.yaml.

    Returns:
        The metrics, as written to metrics.json.

    Raises:
        UserError: where the config, a checkpoint or the data is wrong.
    """
    from rich.console import Console

    from detection.build import build
    from detection.checkpoint import load_checkpoint, load_model, read_categories
    from detection.data.sources import data_source, find_split, load_split
    from detection.detector import Detector
    from detection.engine.evaluate import evaluate, evaluate_exported
    from detection.engine.memory import keep_freed_memory
    from detection.engine.processes import join_processes
    from detection.engine.run_folder import LOGGER, start_logging
    from detection.engine.settings import EvaluationSettings, read_section
    from detection.errors import UserError
    from detection.evaluation.coco import (
        CocoEvaluator,
        metrics_table,
        write_metrics,
        write_results,
    )
    from detection.files import check_folder
    from detection.onnx_detector import OnnxDetector
    from detection.visualization.results import draw_results

    content = plain(config)
    console = Console()
    if content["checkpoint"] is None:
        raise UserError("checkpoint is not set: give checkpoint=FILE, as train_det.py writes it")
    if content["weights"] not in ("ema", "model"):
        raise UserError(f"weights={content['weights']}: give one of ema, model")
    if content["report_images"] < 1:
        raise UserError(f"report_images={content['report_images']}: give at least 1")
    settings = read_section(EvaluationSettings, "evaluation", content["evaluation"])

    def load(path: Path) -> OnnxDetector | dict[str, Any]:
        return OnnxDetector.from_file(path) if path.suffix == ".onnx" else load_checkpoint(path)

    # All are read before anything is measured.
    paths = [Path(content[key]) for key in ("checkpoint", "compare") if content[key]]
    loaded = [load(path) for path in paths]
    first = {"config": {}} if isinstance(loaded[0], OnnxDetector) else loaded[0]
    source = data_source(find_data(content, first))

    with join_processes(content["device"]) as processes:
        if processes.device.type == "cpu":
            keep_freed_memory()
        index = processes.first_then_others(
            lambda: load_split(find_split(build(source), content["split"]))
        )
        name = paths[0].name if paths[0].suffix == ".onnx" else paths[0].stem
        output = Path(content["output"] or paths[0].with_name(f"{name}-{content['split']}"))
        if processes.is_main:
            check_folder(output)
        start_logging(console, None, is_main=processes.is_main)
        for line in [f"{len(index)} images of {index.annotations_file}", *index.describe()]:
            LOGGER.info(line)
        evaluator = CocoEvaluator(index.ground_truth(), backend=settings.backend)

        detectors: list[Detector | OnnxDetector] = []
        found: list[Evaluation] = []
        for path, file in zip(paths, loaded, strict=True):
            with _naming(path):
                if isinstance(file, OnnxDetector):
                    detectors.append(file)
                    found.append(
                        evaluate_exported(file, index, evaluator, batch_size=settings.batch_size)
                    )
                    continue
                parts = load_model(file, weights=content["weights"])
                detector = Detector(parts, read_categories(file), processes.device)
                detectors.append(detector)
                evaluation = evaluate(
                    detector,
                    index,
                    evaluator,
                    processes=processes,
                    criterion=parts.criterion,
                    batch_size=settings.batch_size,
                    num_workers=settings.num_workers,
                )
                assert evaluation is not None  # nothing told it to stop
                found.append(evaluation)
        if processes.is_main:
            write_metrics(found[0].metrics, output / "metrics.json")
            write_results(found[0].results, output / "detections.json")
            draw_results(
                index,
                found[0].results,
                output / "visualizations",
                num_pictures=settings.num_pictures,
                score_threshold=settings.picture_score_threshold,
            )
            console.print(metrics_table(found[0].metrics))
            LOGGER.info("metrics, detections and pictures: %s", output)
            if content["report"] or content["compare"]:
                _report(content, detectors[0], index, evaluator, paths, found, output, console)
    return found[0].metrics


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have a UserError say which of two files it is about."""
    from detection.errors import UserError

    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _report(
    content: dict[str, Any],
    detector: Detector | OnnxDetector,
    index: CocoIndex,
    evaluator: CocoEvaluator,
    paths: list[Path],
    found: list[Evaluation],
    output: Path,
    console: Console,
) -> None:
    """Print the comparison of two checkpoints, and write the page, as the config asks."""
    from detection.engine.run_folder import LOGGER, RunFolder
    from detection.evaluation.analysis import analyze
    from detection.evaluation.comparison import compare, comparison_table, write_comparison
    from detection.report import Run, write_report

    names = name_apart(paths)
    runs = [
        Run(name, own.metrics, analyze(evaluator, own.results))
        for name, own in zip(names, found, strict=True)
    ]
    if len(runs) == 2:
        comparison = compare(runs[0].analysis, runs[1].analysis)
        console.print(f"{names[1]} less {names[0]}:", comparison_table(comparison), markup=False)
        write_comparison(comparison, output / "comparison.json")
        LOGGER.info("differences by class and image: %s", output / "comparison.json")
    if content["report"]:
        page = write_report(
            output / "report" / "index.html",
            title=names[0],
            facts={
                "checkpoint": str(paths[0]),
                "annotations": str(index.annotations_file),
                "images": str(len(index)),
            },
            index=index,
            run=runs[0],
            other=runs[1] if len(runs) == 2 else None,
            history=RunFolder(paths[0].resolve().parent.parent).read_metrics(),
            num_images=content["report_images"],
            sections=_show_routing(detector, index, content["report_images"]),
        )
        LOGGER.info("report: %s", page)


def _show_routing(
    detector: Detector | OnnxDetector, index: CocoIndex, num_images: int
) -> list[Section]:
    """Sections on the routing over as many images as the page shows; none for static networks."""
    from detection.data.sampler import spread
    from detection.detector import Detector
    from detection.errors import UserError
    from detection.report import routing_sections
    from detection.visualization.routing import collect_routing, load_batches

    if not isinstance(detector, Detector):
        return []
    batches = load_batches(detector, index, spread(len(index), num_images))
    try:
        routing = collect_routing(detector, batches, index.names)
    except UserError:
        return []
    return routing_sections(routing)


def name_apart(paths: list[Path]) -> list[str]:
    """Short names for files: one by its run folder, two by the parts in which they differ."""
    if len(set(paths)) == 1:
        folder = paths[0].resolve().parent
        run = folder.parent.name if folder.name == "checkpoints" else folder.name
        return [f"{run}/{path.name}" for path in paths]
    common = os.path.commonpath([path.resolve().parent for path in paths])
    return [str(path.resolve().relative_to(common)) for path in paths]


if __name__ == "__main__":
    main()
