"""A training run, from its config to its last checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from torch import nn

from condconv import count_parameters
from detection.augmentation import Augmentation
from detection.build import build, build_model
from detection.checkpoint import read_categories, save_checkpoint
from detection.data.coco import CocoIndex, check_same_categories, check_trainable
from detection.data.dataset import find_shorter_side
from detection.data.sources import data_source, load_split
from detection.detector import Detector
from detection.engine.evaluate import Evaluation, evaluate
from detection.engine.inputs import TrainingInputs
from detection.engine.loggers import Logger, NoLogger, PatientLogger
from detection.engine.memory import keep_freed_memory
from detection.engine.optimization import average_weights, build_optimizer, build_schedule
from detection.engine.processes import Processes, join_processes
from detection.engine.run_folder import LOGGER, RunFolder, read_json, start_logging
from detection.engine.settings import EvaluationSettings, TrainerSettings, read_section
from detection.engine.state import TrainState
from detection.engine.stop import StopRequest
from detection.engine.train import accept_sizes, open_image_cache, prepare_network, run_training
from detection.errors import UserError
from detection.evaluation.coco import (
    CocoEvaluator,
    fastest_backend,
    metrics_table,
    write_metrics,
)
from detection.importers.detector import start_detector
from detection.structures import Category
from detection.visualization.gallery import contact_sheet
from detection.visualization.results import draw_pairs, draw_results


class Outcome(NamedTuple):
    """How a run ended.

    Args:
        metrics: of the best checkpoint so far; empty where there is none yet.
        step: the last one taken.
        is_finished: False where a signal stopped it.
    """

    metrics: dict[str, Any]
    step: int
    is_finished: bool


def run(content: Mapping[str, Any], request: StopRequest) -> Outcome:
    """Train as a config says, or go on with a run.

    Args:
        content: the config, as plain containers, its model complete.
        request: asked in each step and evaluation; received in all processes where it was in one.

    Raises:
        UserError: where the config, the data or a file is wrong.
    """
    settings = read_section(TrainerSettings, "trainer", content["trainer"])
    evaluation = read_section(EvaluationSettings, "evaluation", content["evaluation"])
    augmentation = read_section(Augmentation, "data.augmentation", content["data"]["augmentation"])
    seed = content["seed"]
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: give a whole number from 0 on, below 2 ** 63")
    torch.use_deterministic_algorithms(settings.deterministic)
    if settings.deterministic:  # without it cuBLAS is not, and refuses
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    console = Console()

    with join_processes(settings.device) as processes, ExitStack() as stack:
        # Everything is checked and built before the run folder is touched.
        start_logging(console, None, is_main=processes.is_main)
        settings.check_shares(processes.world_size)
        if settings.keep_memory and processes.device.type == "cpu":
            keep_freed_memory()
        folder = RunFolder(processes.share(content["run_dir"]))
        checkpoint = None
        if not content["resume"]:
            folder.check_new()
        else:
            if processes.is_main:
                stack.enter_context(folder.lock())
            checkpoint = folder.load_newest(processes)
        train_index, val_index = processes.first_then_others(lambda: _load_splits(content))
        categories = train_index.categories
        if checkpoint is not None:
            _check_classes(train_index, checkpoint, folder)

        torch.manual_seed(seed)
        parts = build_model(content["model"], len(categories))
        started: list[str] = []
        if checkpoint is None:
            started = start_detector(
                parts.network,
                categories,
                weights=content["model"].get("weights"),
                backbone_weights=content["backbone_weights"],
            )
        network = prepare_network(parts.network, settings, processes)
        shorter_side = find_shorter_side(content["data"]["shrink"], parts.preprocess.input_size)
        cache = stack.enter_context(
            open_image_cache(train_index, shorter_side, settings, processes)
        )
        inputs = TrainingInputs(
            train_index,
            parts.preprocess,
            augmentation,
            seed=seed,
            shorter_side=shorter_side,
            cache=cache,
        )
        accept_sizes(network, inputs.input_sizes)
        state = _build_state(content, network, settings, processes)
        if checkpoint is not None:
            state.load_state_dict(checkpoint, processes)
        ground_truth = val_index.ground_truth()
        evaluator = CocoEvaluator(ground_truth, backend=fastest_backend())
        final_evaluator = CocoEvaluator(ground_truth, backend=evaluation.backend)

        logger: Logger = NoLogger()
        if processes.is_main:
            if not content["resume"]:
                stack.enter_context(folder.lock())
                folder.check_new()  # another run may have begun meanwhile
            logger = PatientLogger(
                build(content["logger"], folder=folder.path, start_step=state.step, config=content)
            )
            stack.push(lambda kind, *_: logger.close(failed=kind is not None))
            folder.create(content)
            folder.cut_metrics(state.step)
        start_logging(console, folder.log, is_main=processes.is_main)
        known = [*train_index.describe(inputs.max_boxes), *val_index.describe()]
        for line in [*_describe(train_index, val_index, network, folder), *started, *known]:
            LOGGER.info(line)

        def evaluate_network(
            network: nn.Module, should_stop: Callable[[], bool]
        ) -> Evaluation | None:
            return evaluate(
                Detector(parts._replace(network=network), categories, processes.device),
                val_index,
                evaluator,
                processes=processes,
                criterion=parts.criterion,
                batch_size=evaluation.batch_size,
                num_workers=evaluation.num_workers,
                should_stop=should_stop,
            )

        is_finished = run_training(
            state,
            inputs=inputs,
            preprocess=parts.preprocess.to(processes.device),
            criterion=parts.criterion,
            evaluate=evaluate_network,
            save=partial(save_checkpoint, config=content, categories=categories),
            draw=partial(_draw_overview, val_index, evaluation),
            logger=logger,
            folder=folder,
            settings=settings,
            processes=processes,
            request=request,
            console=console,
        )
        if is_finished and processes.is_main:
            results = read_json(folder.detections)
            metrics = {**read_json(folder.metrics), **final_evaluator.evaluate(results)}
            write_metrics(metrics, folder.metrics)
            console.print(metrics_table(metrics))
            is_finished = not request.received
            if is_finished:
                draw_results(
                    val_index,
                    results,
                    folder.visualizations,
                    num_pictures=evaluation.num_pictures,
                    score_threshold=evaluation.picture_score_threshold,
                )
                LOGGER.info("done: best AP %.4f; see %s", state.best_metric, folder.path)
        request.received = processes.any(request.received)
        metrics = read_json(folder.metrics) if folder.metrics.exists() else {}
        return Outcome(processes.share(metrics), state.step, is_finished)


def _load_splits(content: Mapping[str, Any]) -> tuple[CocoIndex, CocoIndex]:
    splits = build(data_source(content["data"]))
    train_index, val_index = load_split(splits.train), load_split(splits.val)
    check_same_categories(train_index, val_index)
    check_trainable(train_index)
    return train_index, val_index


def _check_classes(index: CocoIndex, checkpoint: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise a UserError where the data has other classes than the run that goes on with them."""

    def name(category: Category | None) -> str:
        return f"the category {category.id} {category.name!r}" if category else "no category more"

    for saved, own in zip_longest(read_categories(checkpoint), index.categories):
        if saved != own:
            raise UserError(
                f"{index.annotations_file} has {name(own)} where the run has {name(saved)}: "
                "resume=true needs the same classes; a new run with "
                f"model.weights={folder.last} takes what it learnt of each name"
            )


def _build_state(
    content: Mapping[str, Any], network: nn.Module, settings: TrainerSettings, processes: Processes
) -> TrainState:
    optimizer = build_optimizer(content["optimizer"], network)
    return TrainState(
        network=network,
        optimizer=optimizer,
        schedule=build_schedule(content["schedule"], optimizer),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=settings.precision == "fp16"),
        ema=average_weights(network, settings.ema_decay) if settings.ema_decay else None,
    )


def _describe(
    train_index: CocoIndex, val_index: CocoIndex, network: nn.Module, folder: RunFolder
) -> list[str]:
    lines = [
        f"{len(train_index)} training and {len(val_index)} validation images, "
        f"{len(train_index.categories)} classes; {count_parameters(network) / 1e6:.2f}M "
        f"parameters; run folder {folder.path}"
    ]
    frozen = sum(item.numel() for item in network.parameters() if not item.requires_grad)
    return [*lines, f"{frozen:,} of the parameters are frozen"] if frozen else lines


def _draw_overview(
    index: CocoIndex, settings: EvaluationSettings, results: list[dict[str, Any]]
) -> Image.Image:
    pairs = draw_pairs(
        index, results, num_pictures=6, score_threshold=settings.picture_score_threshold
    )
    sheet = list(pairs.values()) or [Image.new("RGB", (1, 1))]  # none can be read
    return contact_sheet(sheet, columns=2, max_size=600)
