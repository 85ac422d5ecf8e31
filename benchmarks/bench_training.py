"""Whole training steps, data included, against torchvision's reference training loop.

    python benchmarks/bench_training.py [--quick] [--rounds 5] [--steps 6] [--output FILE] \\
        [--their-precision fp32] [group=option ...] [key=value ...]

The overrides are those of train_det.py. Both sides train the same static SSD300 on the same files
with the same batch, number of workers and threads. What stands around the network is on the one
side this project's, on the other torchvision's: `CocoDetection`, the transforms of its
references/detection (preset "ssd"), its collate, `torchvision.models.detection.SSD` with its
resize, matching and loss, and the steps of its `train_one_epoch`. Both augment with colours,
zoom-out, crop and flip; ours also keeps a moving average of the weights.

Ours has the options of train_det.py: by default `trainer.channels_last` and, on a CPU,
`trainer.keep_memory`; torchvision's reference has neither. As keeping memory would help any loop,
torchvision's is timed a second time with it.

Each side has a process of its own, and they run in turn, round after round; a ratio above 1 means
that ours is faster. Then it says where the time of a step of ours goes; `loading` is the wait for
the workers.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.ssd import SSD
from torchvision.transforms import v2

from detection.augmentation import Augmentation
from detection.build import ModelParts, build, build_model
from detection.cli import fail
from detection.config import config_dir, plain
from detection.data.coco import CocoIndex
from detection.data.dataset import find_shorter_side
from detection.data.sources import data_source, load_split
from detection.engine.inputs import TrainingInputs
from detection.engine.memory import keep_freed_memory
from detection.engine.optimization import average_weights, build_optimizer
from detection.engine.processes import Processes, choose_device
from detection.engine.settings import PRECISIONS, TrainerSettings, read_section
from detection.engine.state import TrainState
from detection.engine.stop import StopRequest
from detection.engine.train import (
    AUTOCAST_DTYPES,
    accept_sizes,
    make_loader,
    prepare_network,
    set_training_mode,
    take_step,
)
from detection.errors import UserError
from detection.overrides import check_overrides

# What both sides do; overrides may change it for both.
COMMON = (
    *("optimizer=sgd", "optimizer.lr=1e-3", "schedule=constant", "trainer.steps=1000000"),
    *("model.num_experts=1", "trainer.batch_size=16", "trainer.num_workers=1"),
    *("data.augmentation.photometric=0.5", "data.augmentation.zoom_out=0.5"),
)
QUICK = ("model.width=0.25", "model.input_size=64", "trainer.batch_size=2")
OURS, THEIRS, KEEPING = "ours", "torchvision", "torchvision, memory kept"
PARTS = ("loading", "preprocess", "forward", "loss", "backward", "optimizer", "average, schedule")


class Setting(NamedTuple):
    """What both sides are given."""

    config: dict[str, Any]
    settings: TrainerSettings
    index: CocoIndex
    parts: ModelParts
    processes: Processes


def read_setting(overrides: Sequence[str]) -> Setting:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = plain(compose("train", overrides=list(overrides)))
    settings = read_section(TrainerSettings, "trainer", config["trainer"])
    index = load_split(build(data_source(config["data"])).train)
    torch.manual_seed(0)
    parts = build_model(config["model"], len(index.categories))
    return Setting(config, settings, index, parts, Processes(0, 1, choose_device(settings.device)))


class Clock:
    """Adds up the time between marks, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        before = self._last
        self.start()
        self.seconds[name] += self._last - before


class Marked(nn.Module):
    """A module that marks its end."""

    def __init__(self, module: nn.Module, name: str, clock: Clock) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.clock = clock

    def forward(self, *arguments: Any) -> Any:
        found = self.module(*arguments)
        self.clock.mark(self.name)
        return found


def make_ours(setting: Setting) -> tuple[Callable[[], float], Callable[[int], dict[str, float]]]:
    """A step, which gives its loss; and a number of steps, in parts."""
    config, settings, index, parts, processes = setting
    network = prepare_network(parts.network, settings, processes)
    shorter_side = find_shorter_side(config["data"]["shrink"], parts.preprocess.input_size)
    inputs = TrainingInputs(
        index,
        parts.preprocess,
        Augmentation(**config["data"]["augmentation"]),
        seed=0,
        shorter_side=shorter_side,
    )
    accept_sizes(network, inputs.input_sizes)
    optimizer = build_optimizer(config["optimizer"], network)
    decay = settings.ema_decay
    state = TrainState(
        network=network,
        optimizer=optimizer,
        schedule=LambdaLR(optimizer, lambda step: min(1.0, step / 1000)),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=settings.precision == "fp16"),
        ema=average_weights(network, decay) if decay else None,
    )
    set_training_mode(network, freeze_batch_norm=settings.freeze_batch_norm)
    batches = iter(make_loader(inputs.dataset, 0, settings, 0, processes))
    preprocess = parts.preprocess.to(processes.device)

    def step() -> float:
        losses, _ = take_step(
            *(state, network, [next(batches)], inputs, preprocess, parts.criterion),
            *(settings, processes, StopRequest()),
        )
        return losses["loss"]

    def profile(num_steps: int) -> dict[str, float]:
        clock = Clock(processes.device)
        marked = (
            Marked(network, "forward", clock),
            Marked(preprocess, "preprocess", clock),
            Marked(parts.criterion, "loss", clock),
        )
        hooks = [
            optimizer.register_step_pre_hook(lambda *_: clock.mark("backward")),
            optimizer.register_step_post_hook(lambda *_: clock.mark("optimizer")),
        ]
        for _ in range(num_steps):
            clock.start()
            batch = next(batches)
            clock.mark("loading")
            take_step(
                *(state, marked[0], [batch], inputs, *marked[1:]),
                *(settings, processes, StopRequest()),
            )
            clock.mark("average, schedule")
        for hook in hooks:
            hook.remove()
        return {name: clock.seconds[name] / num_steps for name in PARTS}

    return step, profile


class Levels(nn.Module):
    """A network in the place of torchvision's backbone: its predictions are the feature maps."""

    out_channels = (4, 4)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        predictions = self.network(images)
        return OrderedDict(deltas=predictions.deltas, logits=predictions.logits)


class Head(nn.Module):
    """The other half of `Levels`."""

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        return {"bbox_regression": levels[0], "cls_logits": levels[1]}


class Anchors(nn.Module):
    """A network's anchors in the place of torchvision's."""

    aspect_ratios = ((), ())

    def __init__(self, anchors: Tensor) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors)

    def forward(self, images: Any, levels: list[Tensor]) -> list[Tensor]:
        return [self.anchors] * len(levels[0])  # pyright: ignore


def collate_lists(batch: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*batch, strict=True))


def make_theirs(setting: Setting) -> Callable[[], float]:
    """A step of torchvision's reference, which gives its loss."""
    config, settings, index, parts, processes = setting
    mean = (123.0, 117.0, 104.0)
    transforms = v2.Compose(
        [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=mean),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(p=0.5),
            v2.ToImage(),
            v2.ToDtype(torch.float, scale=True),
            v2.ConvertBoundingBoxFormat("XYXY"),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    dataset = wrap_dataset_for_transforms_v2(
        CocoDetection(index.images_dir, index.annotations_file, transforms=transforms),
        target_keys=["boxes", "labels", "image_id"],
    )
    # The reference leaves out images without boxes.
    with_boxes = [i for i, id in enumerate(dataset.ids) if dataset.coco.getAnnIds(imgIds=id)]
    dataset = torch.utils.data.Subset(dataset, with_boxes)
    # Endless, as ours: on a small set, starting workers anew for each epoch would count for much.
    order = RandomSampler(dataset, replacement=True, num_samples=1_000_000)
    sampler = BatchSampler(order, settings.batch_size, drop_last=True)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=settings.num_workers,
        collate_fn=collate_lists,
    )
    labels = {category.id: label for label, category in enumerate(index.categories, start=1)}
    network = parts.network
    size = network.input_size
    model = SSD(
        Levels(network),
        Anchors(network.anchors),  # pyright: ignore
        size=(size, size),
        num_classes=1 + len(index.categories),
        head=Head(),
    ).to(processes.device)
    model.train()
    arguments = config["optimizer"]
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=arguments["lr"],
        momentum=arguments["momentum"],
        weight_decay=arguments["weight_decay"],
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 1000, total_iters=1000)

    batches = iter(loader)
    device = processes.device
    dtype = AUTOCAST_DTYPES.get(settings.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")

    def step() -> float:
        images, targets = next(batches)
        images = [image.to(device) for image in images]
        targets = [
            {
                "boxes": target["boxes"].to(device),
                "labels": torch.tensor([labels[id] for id in target["labels"].tolist()]).to(
                    device, torch.int64
                ),
            }
            for target in targets
        ]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            losses = model(images, targets)
            total = sum(losses.values())
        value = total.item()
        if not math.isfinite(value):
            raise SystemExit(f"torchvision's loss is {value}")
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        return value

    return step


def peak_memory(device: torch.device) -> float:
    """MiB: of this process; on a GPU, of the GPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def serve(
    side: str, overrides: list[str], num_threads: int, start_method: str, pipe: Connection
) -> None:
    """Run as many steps as the pipe says and answer their seconds, until it says 0."""
    multiprocessing.set_start_method(start_method, force=True)  # of the loader's workers
    torch.set_num_threads(num_threads)
    setting = read_setting(overrides)
    if side == KEEPING or (side == OURS and keeps_memory(setting)):
        keep_freed_memory()
    step, profile = make_ours(setting) if side == OURS else (make_theirs(setting), None)
    step()
    pipe.send(None)
    while num_steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        if setting.processes.device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start) / num_steps)
    pipe.send(peak_memory(setting.processes.device))
    pipe.send(profile(pipe.recv()) if profile else None)


def keeps_memory(setting: Setting) -> bool:
    return setting.settings.keep_memory and setting.processes.device.type == "cpu"


def compare(
    sides: dict[str, list[str]], *, num_rounds: int, num_steps: int, num_threads: int
) -> dict[str, Any]:
    """Seconds a step of each side in each round, peak memory, and ours in parts.

    Args:
        sides: overrides by the name of the side.
    """
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory, profiles = {}, {}
    with ExitStack() as stack:  # closes the pipes on an error, which ends the processes
        pipes = {}
        for side, overrides in sides.items():
            pipes[side], other = map(stack.enter_context, context.Pipe())
            arguments = (side, overrides, num_threads, multiprocessing.get_start_method(), other)
            context.Process(target=serve, args=arguments).start()
            other.close()
            pipes[side].recv()
        for _ in range(num_rounds):
            for side, pipe in pipes.items():
                pipe.send(num_steps)
                seconds[side].append(pipe.recv())
        for side, pipe in pipes.items():
            pipe.send(0)
            memory[side] = pipe.recv()
            if side == OURS:
                pipe.send(num_steps)
            profiles[side] = pipe.recv()
    return {"seconds": seconds, "memory": memory, "profile": profiles[OURS]}


def describe(found: dict[str, Any], batch_size: int) -> str:
    """The measurements for people."""
    lines = [f"{'':24} {'steps/s':>8} {'images/s':>9} {'spread':>14} {'peak MiB':>9}"]
    for side, seconds in found["seconds"].items():
        median = statistics.median(seconds)
        spread = f"{1 / max(seconds):.3f}..{1 / min(seconds):.3f}"
        lines.append(
            f"{side:24} {1 / median:8.3f} {batch_size / median:9.1f} {spread:>14} "
            f"{found['memory'][side]:9.0f}"
        )
    own = found["seconds"][OURS]
    for side, seconds in found["seconds"].items():
        if side != OURS:
            ratios = [theirs / ours for ours, theirs in zip(own, seconds, strict=True)]
            lines.append(
                f"ours is {statistics.median(ratios):.2f} times as fast as {side} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) and takes "
                f"{found['memory'][OURS] / found['memory'][side]:.2f} of its memory"
            )
    total = sum(found["profile"].values())
    lines.append(f"\na step of ours in parts, {1000 * total:.0f} ms in all:")
    for name, seconds in found["profile"].items():
        lines.append(f"{name:18} {1000 * seconds:8.1f} ms {100 * seconds / total:5.1f} %")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network and batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each side in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--their-precision", choices=PRECISIONS, help="of torchvision's side; else that of ours"
    )
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args, given = parser.parse_known_args(arguments)
    overrides = [*COMMON, *(QUICK if args.quick else ()), *given]
    try:
        overrides = check_overrides("train", overrides)
        setting = read_setting(overrides)
    except UserError as error:
        fail(error)
    settings = setting.settings
    their_precision = args.their_precision or settings.precision
    theirs = [*overrides, f"trainer.precision={their_precision}"]
    sides = {OURS: overrides, THEIRS: theirs}
    if keeps_memory(setting):
        sides[KEEPING] = theirs
    print(
        f"{len(setting.index)} images of {setting.index.annotations_file}; input "
        f"{setting.parts.network.input_size}, batch {settings.batch_size}, "
        f"{settings.num_workers} worker(s), {args.threads} thread(s), {setting.processes.device}, "
        f"{settings.precision} against {their_precision}, torch {torch.__version__}",
        flush=True,
    )
    found = compare(sides, num_rounds=args.rounds, num_steps=args.steps, num_threads=args.threads)
    print(describe(found, settings.batch_size))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    sys.exit(main())
