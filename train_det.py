"""Train a detector: `python train_det.py [key=value ...]`; configs/train.yaml has the keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from detection.cli import hydra_overrides, job_number, resume_command, run_script
from detection.config import data_source, find_model, plain
from detection.engine.stop import StopRequest
from detection.overrides import lay_over

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from detection.structures import Category


def main() -> None:
    """The command `train-det`."""
    with StopRequest() as request:
        run_script(partial(_job, request=request), config_name="train", folder="run_dir")


def _job(config: DictConfig, request: StopRequest) -> None:
    number = job_number()
    if number and request.received:  # a signal stops a sweep, not only the job that runs
        print(f"stopped before job {number}", flush=True)
        return
    train(config, overrides=hydra_overrides(), request=request)


def train(
    config: DictConfig, *, overrides: Sequence[str] = (), request: StopRequest | None = None
) -> dict[str, Any]:
    """Train as a config says.

    Args:
        config: composed from configs/train.yaml.
        overrides: those of the command line; where `config.resume`, they are laid over the config
            that the run was started with.

    Returns:
        The metrics of the best checkpoint so far; empty where there is none yet.

    Raises:
        UserError: where the config, the data or a file is wrong.
    """
    # Imported when the config is known to be sound: torch takes seconds.
    from contextlib import ExitStack

    import torch
    from PIL import Image
    from rich.console import Console

    from condconv import count_parameters
    from detection.augmentation import Augmentation
    from detection.build import build, build_model
    from detection.checkpoint import read_categories, save_checkpoint
    from detection.data.coco import CocoIndex, check_same_categories, check_trainable
    from detection.data.dataset import find_shorter_side
    from detection.data.sources import load_split
    from detection.detector import Detector
    from detection.engine.evaluate import Evaluation, evaluate
    from detection.engine.inputs import TrainingInputs
    from detection.engine.loggers import Logger, NoLogger, PatientLogger
    from detection.engine.memory import keep_freed_memory
    from detection.engine.optimization import average_weights, build_optimizer, build_schedule
    from detection.engine.processes import join_processes, launcher
    from detection.engine.run_folder import LOGGER, RunFolder, read_json, start_logging
    from detection.engine.settings import EvaluationSettings, TrainerSettings, read_section
    from detection.engine.state import TrainState
    from detection.engine.train import (
        accept_sizes,
        open_image_cache,
        prepare_network,
        run_training,
    )
    from detection.errors import UserError
    from detection.evaluation.coco import (
        CocoEvaluator,
        fastest_backend,
        metrics_table,
        write_metrics,
    )
    from detection.importers.detector import start_detector
    from detection.visualization.gallery import contact_sheet
    from detection.visualization.results import draw_pairs, draw_results

    if config.resume:
        config = lay_over(RunFolder(config.run_dir).read_config(), config, overrides)
    content = plain(config)
    content["model"] = find_model(content["model"])
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
        if request is None:
            request = stack.enter_context(StopRequest())
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

        def load_splits() -> tuple[CocoIndex, CocoIndex]:
            splits = build(data_source(content["data"]))
            return load_split(splits.train), load_split(splits.val)

        train_index, val_index = processes.first_then_others(load_splits)
        check_same_categories(train_index, val_index)
        check_trainable(train_index)
        categories = train_index.categories
        if checkpoint is not None:
            for saved, own in zip_longest(read_categories(checkpoint), categories):
                if saved != own:
                    raise UserError(
                        f"{train_index.annotations_file} has {_name(own)} where the run has "
                        f"{_name(saved)}: resume=true needs the same classes; a new run with "
                        f"model.weights={folder.last} takes what it learnt of each name"
                    )

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
        optimizer = build_optimizer(content["optimizer"], network)
        state = TrainState(
            network=network,
            optimizer=optimizer,
            schedule=build_schedule(content["schedule"], optimizer),
            scaler=torch.amp.GradScaler(
                processes.device.type, enabled=settings.precision == "fp16"
            ),
            ema=average_weights(network, settings.ema_decay) if settings.ema_decay else None,
        )
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
        LOGGER.info(
            "%d training and %d validation images, %d classes; %.2fM parameters; run folder %s",
            len(train_index),
            len(val_index),
            len(categories),
            count_parameters(network) / 1e6,
            folder.path,
        )
        frozen = sum(item.numel() for item in network.parameters() if not item.requires_grad)
        if frozen:
            LOGGER.info("%s of the parameters are frozen", f"{frozen:,}")
        known = [*train_index.describe(inputs.max_boxes), *val_index.describe()]
        for line in [*started, *known]:
            LOGGER.info(line)
        pictures = {
            "num_pictures": evaluation.num_pictures,
            "score_threshold": evaluation.picture_score_threshold,
        }

        def evaluate_network(
            network: torch.nn.Module, should_stop: Callable[[], bool]
        ) -> Evaluation | None:
            detector = Detector(parts._replace(network=network), categories, processes.device)
            return evaluate(
                detector,
                val_index,
                evaluator,
                processes=processes,
                criterion=parts.criterion,
                batch_size=evaluation.batch_size,
                num_workers=evaluation.num_workers,
                should_stop=should_stop,
            )

        def draw_overview(results: list[dict[str, Any]]) -> Image.Image:
            pairs = draw_pairs(val_index, results, **pictures | {"num_pictures": 6})
            sheet = list(pairs.values()) or [Image.new("RGB", (1, 1))]  # none can be read
            return contact_sheet(sheet, columns=2, max_size=600)

        finished = run_training(
            state,
            inputs=inputs,
            preprocess=parts.preprocess.to(processes.device),
            criterion=parts.criterion,
            evaluate=evaluate_network,
            save=partial(save_checkpoint, config=content, categories=categories),
            draw=draw_overview,
            logger=logger,
            folder=folder,
            settings=settings,
            seed=seed,
            processes=processes,
            request=request,
            console=console,
        )
        if finished and processes.is_main:
            results = read_json(folder.detections)
            metrics = {**read_json(folder.metrics), **final_evaluator.evaluate(results)}
            write_metrics(metrics, folder.metrics)
            console.print(metrics_table(metrics))
            finished = not request.received
            if finished:
                draw_results(val_index, results, folder.visualizations, **pictures)
                LOGGER.info("done: best AP %.4f; see %s", state.best_metric, folder.path)
        if not finished:
            command = resume_command(folder.path, launcher())
            LOGGER.info("stopped at step %d; go on with: %s", state.step, command)
        request.received = processes.any(request.received)
        metrics = read_json(folder.metrics) if folder.metrics.exists() else {}
        return processes.share(metrics)


def _name(category: Category | None) -> str:
    return f"the category {category.id} {category.name!r}" if category else "no category more"


if __name__ == "__main__":
    main()
