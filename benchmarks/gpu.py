"""What the detectors do on one GPU, in less than 10 minutes: the tables for docs/benchmarks.md.

    python benchmarks/gpu.py [--minutes 9] [--output FILE]
    python benchmarks/gpu.py --quick --device cpu    tiny, to see that it runs

Training steps are those of train_det.py (normalise, forward, loss, backward, SGD) in bf16 and
channels_last. Synthetic batches lie on the GPU; cached ones are uint8 images in host memory,
gathered at random for each step and sent over. Compiled rows come last, and what the minutes do not
suffice for is named and left out. The projection is the paper's COCO recipe, 20,000 steps of 1,024
images, at the best speed of each network; evaluation and decoding of images are not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from detection.build import ModelParts, build_model
from detection.cli import config_dir, plain
from detection.detector import Detector
from detection.engine.optimization import build_optimizer
from detection.engine.processes import choose_device
from detection.structures import Category, Targets

NUM_CLASSES = 80
NUM_BOXES = 20  # slots of a batch's images; COCO's mean is 7.3
NUM_CACHED = 4096
PAPER_IMAGES = 20_000 * 1024
SSD = {"SSD300 static": ["model.num_experts=1"], "SSD300 CondConv": ["model.num_experts=8"]}
RETINANET = {"RetinaNet-R50 640": ["model=retinanet"]}
QUICK = ["model.width=0.25", "model.input_size=64"]


class Row(NamedTuple):
    """One training to be timed."""

    name: str
    overrides: list[str]
    batch_size: int
    compiled: bool
    cached: bool


class Speed(NamedTuple):
    """Of a row: None where memory did not suffice."""

    images_per_second: float | None
    peak_gib: float


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


def build_parts(overrides: Sequence[str]) -> ModelParts:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = plain(compose("train", overrides=list(overrides)))
    torch.manual_seed(0)
    return build_model(config["model"], NUM_CLASSES)


def make_targets(batch_size: int, size: int, device: torch.device) -> Targets:
    corners = torch.rand(batch_size, NUM_BOXES, 2, 2).sort(2).values * (size - 8)
    corners[:, :, 1] += 8
    valid = torch.arange(NUM_BOXES) < torch.randint(1, NUM_BOXES, (batch_size, 1))
    labels = torch.randint(NUM_CLASSES, (batch_size, NUM_BOXES))
    return Targets(corners.flatten(2), labels, valid).to(device)


def make_batches(
    batch_size: int, size: int, cached: bool, device: torch.device
) -> Iterator[Tensor]:
    """Endless uint8 batches (B, 3, S, S) on the device."""
    count = max(NUM_CACHED if device.type == "cuda" else 4, batch_size) if cached else batch_size
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    if not cached:
        images = images.to(device)
        while True:
            yield images
    pinned = device.type == "cuda"
    batch = torch.empty(batch_size, 3, size, size, dtype=torch.uint8, pin_memory=pinned)
    while True:
        if pinned:  # the copy before must have left the buffer
            torch.cuda.current_stream(device).synchronize()
        torch.index_select(images, 0, torch.randint(count, (batch_size,)), out=batch)
        yield batch.to(device, non_blocking=True)


def make_step(row: Row, device: torch.device, compiler: str) -> Callable[[], object]:
    parts = build_parts(row.overrides)
    size = parts.network.input_size
    network = parts.network.to(device, memory_format=torch.channels_last).train()  # pyright: ignore
    optimizer = build_optimizer(
        {"_target_": "torch.optim.SGD", "lr": 1e-3, "momentum": 0.9, "fused": True}, network
    )
    preprocess = parts.preprocess.to(device)
    run = torch.compile(network, dynamic=False, backend=compiler) if row.compiled else network
    targets = make_targets(row.batch_size, size, device)
    batches = make_batches(row.batch_size, size, row.cached, device)

    def step() -> None:
        images = preprocess(next(batches)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predictions = run(images)
        losses = parts.criterion(predictions, targets)
        (losses.total / losses.num_matches.clamp(min=1)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_calls(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call, warm."""
    for _ in range(3):
        call()
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


def measure_training(row: Row, device: torch.device, seconds: float, compiler: str) -> Speed:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch._dynamo.reset()
    try:
        times = time_calls(make_step(row, device, compiler), device, seconds)
        images_per_second = row.batch_size / statistics.median(times)
    except torch.OutOfMemoryError:
        images_per_second = None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Speed(images_per_second, peak / 2**30)


def measure_latency(
    overrides: Sequence[str], device: torch.device, seconds: float
) -> tuple[float, float]:
    """Milliseconds of one image, resized, to detections: the median and the 95th percentile."""
    parts = build_parts(overrides)
    categories = [Category(i, str(i)) for i in range(NUM_CLASSES)]
    detector = Detector(parts, categories, device)
    size = parts.network.input_size
    image = torch.randint(256, (1, 3, size, size), dtype=torch.uint8, device=device)
    sizes = torch.tensor([[480, 640]], device=device)

    def detect() -> object:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
            predictions = detector.forward(image)
        return detector.decode(predictions, sizes)

    times = sorted(time_calls(detect, device, seconds))
    return 1000 * statistics.median(times), 1000 * times[int(0.95 * len(times))]


def project(speeds: dict[str, float]) -> list[str]:
    """What the paper's recipe would take, by network."""
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

    latencies = {}
    models = SSD | ({} if args.quick else RETINANET)
    print("| batch 1 | median ms | 95 % ms |\n|---|--:|--:|")
    for model, own in models.items():
        overrides = [*own, *QUICK] if args.quick else own
        latencies[model] = measure_latency(overrides, device, seconds / 2)
        print(f"| {model} | {latencies[model][0]:.2f} | {latencies[model][1]:.2f} |", flush=True)

    print("\n| training | batch | mode | data | images/s | peak GiB |\n|---|--:|---|---|--:|--:|")
    best: dict[str, float] = {}
    measured: list[dict[str, Any]] = []
    left_out = []
    for row in list_rows(args.quick):
        mode, data = (
            "compiled" if row.compiled else "eager",
            "cached" if row.cached else "synthetic",
        )
        # Compiling takes about a minute.
        if time.monotonic() + (90 if row.compiled and not args.quick else 10) > end:
            left_out.append(f"{row.name}, {row.batch_size}, {mode}, {data}")
            continue
        speed = measure_training(row, device, seconds, compiler)
        text = "out of memory"
        if speed.images_per_second is not None:
            text = f"{speed.images_per_second:,.0f}"
            best[row.name] = max(best.get(row.name, 0.0), speed.images_per_second)
        print(
            f"| {row.name} | {row.batch_size} | {mode} | {data} | {text} | {speed.peak_gib:.1f} |",
            flush=True,
        )
        measured.append(row._asdict() | speed._asdict())
    for text in left_out:
        print(f"left out, the minutes are over: {text}")
    print()
    print("\n".join(project({name: best[name] for name in SSD if name in best})))
    if args.output:
        content = {"device": name, "latency_ms": latencies, "training": measured}
        args.output.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
