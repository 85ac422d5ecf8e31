"""The train loop, counted in optimizer steps."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from detection.data.coco import CocoIndex
from detection.data.dataset import Batch, DetectionDataset, collate
from detection.data.image_cache import SHARED_MEMORY, ImageCache, disk_path, open_cache
from detection.data.sampler import StepSampler
from detection.engine.evaluate import Evaluation
from detection.engine.inputs import TrainingInputs
from detection.engine.loggers import Logger
from detection.engine.meter import Meter
from detection.engine.processes import Processes
from detection.engine.run_folder import LOGGER, RunFolder
from detection.engine.settings import TrainerSettings
from detection.engine.state import TrainState
from detection.engine.stop import StopRequest, start_loader
from detection.errors import UserError
from detection.evaluation.coco import write_metrics, write_results
from detection.models.anchor_network import AnchorNetwork

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_training(
    state: TrainState,
    *,
    inputs: TrainingInputs,
    preprocess: nn.Module,
    criterion: nn.Module,
    evaluate: Callable[[nn.Module, Callable[[], bool]], Evaluation | None],
    save: Callable[..., None],
    draw: Callable[[list[dict[str, Any]]], Image.Image],
    logger: Logger,
    folder: RunFolder,
    settings: TrainerSettings,
    processes: Processes,
    request: StopRequest,
    console: Console,
) -> bool:
    """Train from `state.step` to `settings.steps`, evaluating and saving on the way.

    Args:
        state: changed in place; its network is on the processes' device.
        evaluate: measures a network; metrics must hold `AP`. None where the function that it is
            given says that it should stop.
        save: called with a path and the state's dict, writes a checkpoint; `keep_old_as` as in
            `save_checkpoint`.
        draw: a picture of an evaluation's results, for the logger.
        request: asked in each step and evaluation.

    Returns:
        Whether the run came to its end: False where a signal stopped it.

    Raises:
        UserError: where a loss or its gradient is not finite; last.pt is still that of the last
            time that it was written.
    """
    loader = make_loader(inputs.dataset, state.step, settings, inputs.seed, processes)
    network = distribute(state.network, processes)
    set_training_mode(state.network, freeze_batch_norm=settings.freeze_batch_norm)
    meter = Meter(settings)
    unreadable: set[str] = set()
    saved_step = state.step
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (processes.is_main and console.is_terminal),
    )
    stop = processes.any(request.received) or state.is_exhausted(settings.early_stopping)
    with progress, start_loader(loader) as batches:
        task = progress.add_task("training", total=settings.steps, completed=state.step)
        while not stop and (state.step < settings.steps or state.owes_evaluation):
            if not state.owes_evaluation:  # else the run was stopped in an evaluation
                num_overflows = state.num_overflows
                learning_rate = state.optimizer.param_groups[0]["lr"]
                step_batches = list(islice(batches, settings.num_micro_batches))
                losses, stop = take_step(
                    *(state, network, step_batches, inputs, preprocess, criterion),
                    *(settings, processes, request),
                )
                state.step += 1
                is_last = state.step == settings.steps
                state.owes_evaluation = state.step % settings.evaluate_every == 0 or is_last
                _report_unreadable(step_batches, unreadable)
                if state.num_overflows > num_overflows:
                    LOGGER.debug("step %d: its gradient overflowed in fp16: left out", state.step)

                meter.update(losses)
                if state.step % settings.log_every == 0 or is_last:
                    scalars = {**meter.read(), "learning_rate": learning_rate}
                    if processes.is_main:
                        text = meter.describe(state.step, scalars)
                        LOGGER.debug("step %d/%d  %s", state.step, settings.steps, text)
                        progress.update(task, description=text)
                        folder.append_metrics({"kind": "train", "step": state.step, **scalars})
                        _log_scalars(logger, "train", scalars, state.step)
                progress.update(task, completed=state.step)

            is_best, saves, evaluation = False, state.owes_evaluation, None
            if settings.checkpoint_every is not None:
                saves = saves or state.step % settings.checkpoint_every == 0
            if state.owes_evaluation and not stop:
                # What is measured is what is saved, the network of rank 0.
                processes.share_buffers(state.averaged_network)
                evaluation = evaluate(state.averaged_network, lambda: request.received)
                set_training_mode(state.network, freeze_batch_norm=settings.freeze_batch_norm)
                meter.restart()
                stop = evaluation is None
                if evaluation is not None:
                    is_best = _note_evaluation(state, evaluation, folder, processes)
                    stop = state.is_exhausted(settings.early_stopping)
            if saves or stop:
                content = state.state_dict(processes)
                if processes.is_main:
                    if is_best:
                        save(folder.best, **content)
                    earlier = folder.numbered(saved_step) if saved_step < state.step else None
                    save(folder.last, keep_old_as=earlier, **content)
                    for old in folder.list_numbered()[settings.keep_last - 1 :]:
                        old.unlink()
                    saved_step = state.step
            if evaluation is not None:  # when all is safe: a logger may wait for a network
                _log_scalars(logger, "evaluation", evaluation.scalars, state.step)
                logger.log_picture("detections", partial(draw, evaluation.results), state.step)
    if unreadable:
        LOGGER.warning("%d images could not be read; others took their places", len(unreadable))
    if state.num_overflows:
        LOGGER.warning(
            "%d of %d steps were left out, as their gradients overflowed in fp16: some are at the "
            "start of any run; where they are many, take trainer.precision=bf16 or fp32",
            state.num_overflows,
            state.step,
        )
    if state.is_exhausted(settings.early_stopping):
        LOGGER.info(
            "stopped at step %d: no better AP in %d evaluations",
            state.step,
            state.stale_evaluations,
        )
        return True
    return state.step >= settings.steps and not state.owes_evaluation


def take_step(
    state: TrainState,
    network: nn.Module,
    batches: list[Batch],
    inputs: TrainingInputs,
    preprocess: nn.Module,
    criterion: nn.Module,
    settings: TrainerSettings,
    processes: Processes,
    request: StopRequest,
) -> tuple[dict[str, float], bool]:
    """One optimizer step over the micro-batches of this process.

    Loss sums are differentiated, and the gradients divided once by the number of matches in the
    whole batch, so that neither processes nor micro-batches change the loss.

    Returns:
        The losses of the whole batch, by name and as `loss`; and whether any process was asked to
        stop.
    """
    device = processes.device
    dtype = AUTOCAST_DTYPES.get(settings.precision)
    names: list[str] = []
    totals: Tensor | float = 0.0
    state.optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches, start=1):
        images, targets = inputs.to_device(batch, state.step, device)
        images = preprocess(images)
        if settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        is_last = number == len(batches)
        waits = isinstance(network, DistributedDataParallel) and not is_last
        with network.no_sync() if waits else nullcontext():  # pyright: ignore
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                predictions = network(images)
            losses = criterion(predictions, targets)
            state.scaler.scale(losses.total).backward()
        names = list(losses.sums)
        totals = totals + torch.stack([*losses.sums.values(), losses.divisor]).detach()

    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    asked = torch.tensor(float(request.received), device=device)
    # All that the host needs to know of a step, asked for at once.
    found = torch.cat([torch.stack([norm, asked]), totals])  # pyright: ignore
    sum_norm, num_asked, *sums, divisor = processes.sum(found).tolist()
    divisor = max(divisor, 1.0)
    values = {name: value / divisor for name, value in zip(names, sums, strict=True)}
    values = {"loss": sum(values.values()), **values}
    # In fp16 gradients may overflow: the scaler leaves such a step out.
    checked = values if state.scaler.is_enabled() else {**values, "gradient norm": sum_norm}
    if not all(math.isfinite(value) for value in checked.values()):
        _refuse_step(state.step + 1, checked, batches, processes)

    # DistributedDataParallel gave the mean over the processes.
    factor = processes.world_size / divisor
    for gradient in gradients:
        gradient.mul_(factor)
    if settings.gradient_clip_norm is not None:
        nn.utils.clip_grads_with_norm_(
            state.network.parameters(), settings.gradient_clip_norm, norm * factor
        )
    # A fused optimizer that is told of an overflow still makes its buffers, and leaves in them what
    # was in memory.
    if math.isfinite(sum_norm):
        state.scaler.step(state.optimizer)
        state.schedule.step()
    state.scaler.update()
    if state.ema is not None:
        state.ema.update_parameters(state.network)
    return values, num_asked > 0


def make_loader(
    dataset: DetectionDataset,
    start_step: int,
    settings: TrainerSettings,
    seed: int,
    processes: Processes,
) -> DataLoader[Any]:
    """Micro-batches of this process from `start_step` on; nothing of it depends on the workers."""
    sampler = StepSampler(
        num_images=len(dataset),
        batch_size=settings.batch_size,
        seed=seed,
        start_step=start_step,
        num_steps=settings.steps,
        rank=processes.rank,
        world_size=processes.world_size,
        num_micro_batches=settings.num_micro_batches,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=settings.num_workers,
        # A generator of its own: the loader would draw from the default one.
        generator=torch.Generator(),
        pin_memory=processes.device.type == "cuda",
        persistent_workers=settings.num_workers > 0,
    )


@contextmanager
def open_image_cache(
    index: CocoIndex, shorter_side: int | None, settings: TrainerSettings, processes: Processes
) -> Iterator[ImageCache | None]:
    """The cache that the settings ask for, the same one in all processes of a node.

    Raises:
        UserError: in all processes, where there is too little room in one place.
    """
    if settings.image_cache is None:
        yield None
        return
    in_memory = settings.image_cache == "ram"
    if in_memory:
        path = SHARED_MEMORY / processes.share(f"condconv-detection-{secrets.token_hex(8)}")
    else:
        folder = Path(settings.image_cache_folder) if settings.image_cache_folder else None
        path = disk_path(index, shorter_side=shorter_side, folder=folder)
    try:
        cache = processes.first_then_others(
            lambda: open_cache(path, index, shorter_side=shorter_side, in_memory=in_memory)
        )
    finally:
        # Without a name it is gone with the last process that has it open, however that ends.
        if in_memory:
            path.unlink(missing_ok=True)
    with closing(cache):
        yield cache


def prepare_network(
    network: nn.Module, settings: TrainerSettings, processes: Processes
) -> nn.Module:
    """The network on this process's device, laid out and synchronised as the settings say.

    Raises:
        UserError: where batch norm cannot be synchronised.
    """
    if settings.sync_batch_norm:
        if processes.device.type != "cuda":
            raise UserError("trainer.sync_batch_norm=true works on GPUs only")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network.to(processes.device)


def accept_sizes(network: nn.Module, input_sizes: Sequence[int]) -> None:
    """Have a network take all input sizes that a step may have.

    Raises:
        UserError: where it cannot.
    """
    assert isinstance(network, AnchorNetwork)
    try:
        network.take_sizes(input_sizes)
    except ValueError as error:
        raise UserError(f"augmentation.multi_scale: {error}; give other sizes, or null") from error


def distribute(network: nn.Module, processes: Processes) -> nn.Module:
    """The network over all processes, where there are several."""
    if processes.world_size == 1:
        return network
    device_ids = [processes.device] if processes.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids)


def set_training_mode(network: nn.Module, *, freeze_batch_norm: bool) -> None:
    """Training mode, with batch norm left in inference mode where it is frozen."""
    network.train()
    if freeze_batch_norm:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _note_evaluation(
    state: TrainState,
    evaluation: Evaluation,
    folder: RunFolder,
    processes: Processes,
) -> bool:
    """Note an evaluation, and keep what belongs to the best: metrics.json, detections.json."""
    metrics = {"step": state.step, **evaluation.metrics}
    is_best = metrics["AP"] > state.best_metric
    state.stale_evaluations = 0 if is_best else state.stale_evaluations + 1
    state.owes_evaluation = False
    if is_best:
        state.best_metric = metrics["AP"]
    if processes.is_main:
        folder.append_metrics({"kind": "evaluation", "step": state.step, **evaluation.scalars})
        LOGGER.info(
            "step %d: AP %.4f  AP50 %.4f  loss %.4f%s",
            state.step,
            metrics["AP"],
            metrics["AP50"],
            metrics["loss"],
            "  (best so far)" if is_best else "",
        )
        if is_best:
            write_metrics(metrics, folder.metrics)
            write_results(evaluation.results, folder.detections)
    return is_best


def _log_scalars(logger: Logger, kind: str, scalars: dict[str, float], step: int) -> None:
    logger.log_scalars({f"{kind}/{name}": value for name, value in scalars.items()}, step)


def _refuse_step(
    step: int, values: dict[str, float], batches: list[Batch], processes: Processes
) -> None:
    own = [image_id for batch in batches for image_id in batch.image_ids.tolist()]
    shares = processes.share(processes.gather(own))
    image_ids = sorted(image_id for share in shares for image_id in share)
    described = ", ".join(f"{name} {value}" for name, value in values.items())
    raise UserError(
        f"step {step}: the loss or its gradient is not finite ({described}) on the images "
        f"{image_ids}; nothing of the steps since the last checkpoint is saved: start anew with a "
        "lower optimizer.lr, or go on from there with trainer.gradient_clip_norm"
    )


def _report_unreadable(batches: list[Batch], known: set[str]) -> None:
    names = {name for batch in batches for names in batch.unreadable for name in names}
    for name in names - known:
        known.add(name)
        LOGGER.warning("cannot read %s: another image takes its place", name)
