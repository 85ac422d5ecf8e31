"""What the detectors do on one GPU, in less than 10 minutes: the tables for docs/benchmarks.md.

    python benchmarks/gpu.py [--minutes 9] [--output FILE]
    python benchmarks/gpu.py --quick --device cpu    tiny, to see that it runs

A training step is the engine's own, in bf16 and channels_last with SGD. Synthetic batches lie on
the GPU; cached ones come as in a run with trainer.image_cache, data.shrink=1 and a worker for each
core: drawn pictures of COCO's size, cropped, flipped and resized. Compiled rows come last and show
what torch.compile would give: train_det.py has no option for it. A row that fails says why, and
what the minutes do not suffice for is named and left out. The projection is the paper's recipe for
COCO, 20,000 steps of 1,024 images, at the best speed of each network and kind of row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from torch.optim.lr_scheduler import LambdaLR

from detection.augmentation import Augmentation
from detection.build import ModelParts, build, build_model
from detection.config import config_dir, plain
from detection.data.dataset import Batch, find_shorter_side
from detection.data.index_cache import SETTLING_SECONDS
from detection.data.sources import data_source, load_split
from detection.detector import Detector
from detection.engine.inputs import TrainingInputs
from detection.engine.optimization import build_optimizer
from detection.engine.processes import Processes, choose_device
from detection.engine.settings import TrainerSettings, read_section
from detection.engine.state import TrainState
from detection.engine.stop import StopRequest, start_loader
from detection.engine.train import (
    make_loader,
    open_image_cache,
    prepare_network,
    set_training_mode,
    take_step,
)
from detection.structures import Category, Targets

NUM_CLASSES = 80
NUM_BOXES = 20  # slots of a batch's images; COCO's mean is 7.3
FIRST_COMPILATION = 150.0  # seconds that the first is given; each later one, the longest so far
PAPER_IMAGES = 20_000 * 1024
SSD = {"SSD300 static": ["model.num_experts=1"], "SSD300 CondConv": ["model.num_experts=8"]}
RETINANET = {"RetinaNet-R50 640": ["model=retinanet"]}
# On a CPU in bf16, torch leaves parts of the gradient unset that padded convolutions of a 1 x 1 map
# have, and a network of 64 pixels comes down to such maps.
QUICK = ["model.width=0.25", "model.input_size=64", "trainer.precision=fp32"]


class Row(NamedTuple):
    """One training to be timed."""

    name: str
    overrides: list[str]
    batch_size: int
    compiled: bool
    cached: bool

    @property
    def kind(self) -> str:
        mode = "compiled" if self.compiled else "eager"
        return f"{mode}, {'cached' if self.cached else 'synthetic'}"


class Speed(NamedTuple):
    """Of a row; or why there is none."""

    images_per_second: float | None
    peak_gib: float
    failure: str | None = None


def list_rows(quick: bool) -> list[Row]:
    """The rows of the training table, those first that take the least time to prepare."""
    if quick:
        return [
            Row(name, [*own, *QUICK], 2, compiled, cached)
            for name, own in SSD.items()
            for compiled, cached in ((False, False), (False, True), (True, False))
        ]
    rows = [
        Row(name, own, batch, compiled, False)
        for batch in (256, 1024, 128, 512)
        for compiled in (False, True)
        for name, own in SSD.items()
    ]
    rows += [Row(name, own, 512, False, True) for name, own in SSD.items()]
    rows += [Row(name, own, 32, False, False) for name, own in RETINANET.items()]
    # Compiling takes longest: first everything eager.
    return sorted(rows, key=lambda row: row.compiled)


def read_config(overrides: Sequence[str]) -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return plain(compose("train", overrides=list(overrides)))


def build_parts(config: dict[str, Any]) -> ModelParts:
    torch.manual_seed(0)
    return build_model(config["model"], NUM_CLASSES)


def make_targets(batch_size: int, size: int, device: torch.device) -> Targets:
    corners = torch.rand(batch_size, NUM_BOXES, 2, 2).sort(2).values * (size - 8)
    corners[:, :, 1] += 8
    valid = torch.arange(NUM_BOXES) < torch.randint(1, NUM_BOXES, (batch_size, 1))
    labels = torch.randint(NUM_CLASSES, (batch_size, NUM_BOXES))
    return Targets(corners.flatten(2), labels, valid).to(device)


@contextmanager
def prepare_step(
    row: Row, overrides: Sequence[str], device: torch.device, compiler: str
) -> Iterator[Callable[[], object]]:
    """A step as train_det.py takes it; it is warm, and so are the workers and the cache."""
    config = read_config(
        [
            *("optimizer=sgd", "optimizer.lr=1e-3", "trainer.ema_decay=null", "data.shrink=1"),
            *("trainer.precision=bf16", f"trainer.batch_size={row.batch_size}"),
            *("trainer.steps=1000000", *overrides, *row.overrides),
        ]
    )
    settings = read_section(TrainerSettings, "trainer", config["trainer"])
    processes = Processes(0, 1, device)
    index = load_split(build(data_source(config["data"])).train)
    parts = build_parts(config)
    side = find_shorter_side(config["data"]["shrink"], parts.preprocess.input_size)
    network = prepare_network(parts.network, settings, processes)
    set_training_mode(network, freeze_batch_norm=False)
    optimizer = build_optimizer(config["optimizer"], network)
    state = TrainState(
        network=network,
        optimizer=optimizer,
        schedule=LambdaLR(optimizer, lambda step: min(1.0, step / 1000)),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
    )
    run = torch.compile(network, dynamic=False, backend=compiler) if row.compiled else network
    preprocess = parts.preprocess.to(device)
    with ExitStack() as stack:
        cache = stack.enter_context(open_image_cache(index, side, settings, processes))
        inputs = TrainingInputs(
            *(index, parts.preprocess),
            Augmentation(**config["data"]["augmentation"]),
            seed=0,
            shorter_side=side,
            cache=cache,
        )
        num_warm = 3
        if row.cached:
            loader = make_loader(inputs.dataset, 0, settings, 0, processes)
            batches = stack.enter_context(start_loader(loader))
            # Over the first epoch, and what the workers have done ahead.
            num_warm += len(index) // row.batch_size + 2 * settings.num_workers
        else:
            batches = repeat(make_batch(row.batch_size, parts.network.input_size, device))

        def step() -> None:
            take_step(
                *(state, run, [next(batches)], inputs, preprocess, parts.criterion),
                *(settings, processes, StopRequest()),
            )

        for _ in range(num_warm):
            step()
        yield step


def make_batch(batch_size: int, size: int, device: torch.device) -> Batch:
    """A synthetic batch on the device."""
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8, device=device)
    sizes = torch.tensor([[size, size]] * batch_size)
    targets = make_targets(batch_size, size, device)
    return Batch(images, targets, torch.arange(batch_size), sizes, ())


def time_calls(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_training(
    row: Row, overrides: Sequence[str], device: torch.device, seconds: float, compiler: str
) -> Speed:
    gc.collect()  # of a row that failed
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch._dynamo.reset()
    images_per_second = failure = None
    try:
        with prepare_step(row, overrides, device, compiler) as step:
            times = time_calls(step, device, seconds)
        # The mean: where workers are what is slow, they make steps of unequal length.
        images_per_second = row.batch_size / statistics.mean(times)
    except Exception as error:  # the other rows can be measured all the same
        failure = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Speed(images_per_second, peak / 2**30, failure)


def measure_latency(
    overrides: Sequence[str], device: torch.device, seconds: float
) -> tuple[float, float]:
    """Milliseconds of one image, resized, to detections: the median and the 95th percentile."""
    parts = build_parts(read_config(overrides))
    categories = [Category(i, str(i)) for i in range(NUM_CLASSES)]
    detector = Detector(parts, categories, device)
    size = parts.network.input_size
    image = torch.randint(256, (1, 3, size, size), dtype=torch.uint8, device=device)
    sizes = torch.tensor([[480, 640]], device=device)

    def detect() -> object:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
            predictions = detector.forward(image)
        return detector.decode(predictions, sizes)

    for _ in range(3):
        detect()
    times = sorted(time_calls(detect, device, seconds))
    return 1000 * statistics.median(times), 1000 * times[int(0.95 * len(times))]


def project(speeds: dict[str, float]) -> list[str]:
    """What the paper's recipe would take, by network and kind of row."""
    return [
        f"{name}: {PAPER_IMAGES / 1e6:.1f}M images at {speed:,.0f} images/s take "
        f"{PAPER_IMAGES / speed / 3600:.2f} hours"
        for name, speed in speeds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, some steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args(arguments)
    device = choose_device(args.device)
    end = time.monotonic() + 60 * args.minutes
    seconds, compiler = (0.1, "eager") if args.quick else (4.0, "inductor")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16, channels_last\n", flush=True)
    latencies: dict[str, tuple[float, float]] = {}
    measured: list[dict[str, Any]] = []

    def write() -> None:
        if args.output:
            content = {"device": name, "latency_ms": latencies, "training": measured}
            args.output.write_text(json.dumps(content, indent=2))

    models = SSD | ({} if args.quick else RETINANET)
    print("| batch 1 | median ms | 95 % ms |\n|---|--:|--:|")
    for model, own in models.items():
        overrides = [*own, *QUICK] if args.quick else own
        latencies[model] = measure_latency(overrides, device, seconds / 2)
        print(f"| {model} | {latencies[model][0]:.2f} | {latencies[model][1]:.2f} |", flush=True)
        write()

    print("\n| training | batch | mode, data | images/s | peak GiB |\n|---|--:|---|--:|--:|")
    best: dict[str, float] = {}
    left_out = []
    longest = FIRST_COMPILATION
    with TemporaryDirectory() as folder:
        common = draw_images(Path(folder), quick=args.quick)
        for row in list_rows(args.quick):
            start = time.monotonic()
            needed = 20.0
            if row.compiled and not args.quick:
                needed = 1.2 * longest
            if start + needed > end:
                left_out.append(f"{row.name}, {row.batch_size}, {row.kind}")
                continue
            cache = ["trainer.image_cache=disk", f"trainer.image_cache_folder='{folder}/cache'"]
            overrides = [*common, *(cache if row.cached else [])]
            speed = measure_training(row, overrides, device, seconds, compiler)
            if row.compiled:
                known = [one["seconds"] for one in measured if one["compiled"]]
                longest = max([time.monotonic() - start, *known])
            text = speed.failure
            if speed.images_per_second is not None:
                text = f"{speed.images_per_second:,.0f}"
                key = f"{row.name}, {row.kind}"
                best[key] = max(best.get(key, 0.0), speed.images_per_second)
            print(
                f"| {row.name} | {row.batch_size} | {row.kind} | {text} | {speed.peak_gib:.1f} |",
                flush=True,
            )
            took = {"seconds": time.monotonic() - start}
            measured.append(row._asdict() | speed._asdict() | took)
            write()
    for text in left_out:
        print(f"left out, the minutes are over: {text}")
    print()
    print("\n".join(project({key: best[key] for key in best if key.startswith(tuple(SSD))})))


def draw_images(folder: Path, *, quick: bool) -> list[str]:
    """Make the data for cached rows, and give the overrides for it."""
    count, size, workers = (8, "[64,80]", 1) if quick else (512, "[480,640]", os.cpu_count())
    overrides = [f"data.root='{folder}'", f"data.num_train={count}", "data.num_val=1"]
    overrides += [f"data.image_size={size}", f"trainer.num_workers={workers}"]
    build(data_source(read_config(overrides)["data"]))
    time.sleep(SETTLING_SECONDS)  # what has just changed is not cached
    return overrides


if __name__ == "__main__":
    main()
