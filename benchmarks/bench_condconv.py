"""Time and memory of CondConv2d beside timm's CondConv2d and the static convolution.

    python benchmarks/bench_condconv.py [--quick] [--threads 2] [--channels-last] [--strategies] \\
        [--others] [--keep-memory] [--output FILE]

All sides of a row run in each round, so that a busy moment hits them alike, in a new order each
time, as a side pays for what the one before it did to the caches and to freed memory; times are
medians over the rounds. A ratio above 1 means that CondConv2d is faster. The memory of a row
is what a forward and backward pass adds at its peak. `--strategies` also times every execution
strategy: the table that `condconv.strategies.choose_strategy` rests on. `--others` has rows of its
own: maps of one position, as in squeeze-and-excitation, and pointwise layers of groups.
`--keep-memory` has freed memory kept for both sides, as train_det.py does; else the C library
decides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports a missing GPU as an error

import torch
from timm.layers.cond_conv2d import CondConv2d as TimmCondConv2d
from torch import Tensor, nn

from condconv import CondConv2d, condconv2d, count_multiply_adds
from condconv.strategies import Strategy
from detection.engine.memory import keep_freed_memory
from detection.models.ssd import ssd_mobilenet_v1

NUM_EXPERTS = 8


class Row(NamedTuple):
    family: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    size: int
    groups: int = 1

    def __str__(self) -> str:
        return (
            f"{self.family} {self.in_channels}->{self.out_channels} s{self.stride} at {self.size}"
        )


ROWS = (
    Row("pointwise", 256, 512, 1, 1, 19),
    Row("pointwise", 512, 512, 1, 1, 19),
    Row("pointwise", 512, 1024, 1, 1, 10),
    Row("pointwise", 1024, 1024, 1, 1, 10),
    Row("depthwise", 512, 512, 3, 1, 19, 512),
    Row("depthwise", 512, 512, 3, 2, 19, 512),
    Row("depthwise", 1024, 1024, 3, 1, 10, 1024),
    Row("depthwise", 1024, 1024, 3, 2, 10, 1024),
    Row("strided 3x3", 256, 512, 3, 2, 10),
    Row("strided 3x3", 128, 256, 3, 2, 5),
    Row("3x3", 256, 256, 3, 1, 38),
    Row("3x3", 256, 256, 3, 1, 19),
    Row("3x3", 256, 256, 3, 1, 10),
)
OTHER_ROWS = (
    Row("one position", 960, 240, 1, 1, 1),
    Row("one position", 64, 128, 3, 2, 2),
    Row("one position", 256, 512, 3, 2, 2),
    Row("pointwise groups", 240, 240, 1, 1, 28, 3),
    Row("pointwise groups", 512, 512, 1, 1, 14, 32),
)
QUICK_ROWS = (ROWS[1], ROWS[2], ROWS[5], ROWS[8], ROWS[9])


def measure(
    sides: dict[str, Callable[[], object]], *, seconds: float, device: str
) -> dict[str, float]:
    """Median milliseconds of each side, run in turn for `seconds` and at least 5 rounds.

    The order is drawn anew for each round.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    order, generator = list(sides), random.Random(0)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[order[0]]) < 5:
        generator.shuffle(order)
        for name in order:
            synchronize()
            start = time.perf_counter()
            sides[name]()
            synchronize()
            times[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_peak(run: Callable[[], object], device: str) -> int:
    """Bytes that `run` adds at its peak."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    # The public tables sum allocations by operator; only the events know their order.
    kineto: Any = profile.profiler
    events = kineto.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        total += change
        peak = max(peak, total)
    return peak


def build_sides(
    row: Row, batch: int, device: str, memory_format: torch.memory_format
) -> dict[str, Callable[[], Tensor]]:
    padding = row.kernel_size // 2
    ours = CondConv2d(
        row.in_channels, row.out_channels, row.kernel_size, row.stride, padding,
        groups=row.groups, bias=False, num_experts=NUM_EXPERTS,
    ).to(device)  # fmt: skip
    theirs = TimmCondConv2d(
        row.in_channels, row.out_channels, row.kernel_size, row.stride, padding,
        groups=row.groups, bias=False, num_experts=NUM_EXPERTS,
    ).to(device)  # fmt: skip
    theirs.load_state_dict({"weight": ours.weight.detach().flatten(1)})
    static = nn.Conv2d(
        row.in_channels, row.out_channels, row.kernel_size, row.stride, padding,
        groups=row.groups, bias=False,
    ).to(device)  # fmt: skip
    static.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x = torch.randn(batch, row.in_channels, row.size, row.size, device=device)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    routing = torch.rand(batch, NUM_EXPERTS, device=device, requires_grad=True)
    torch.testing.assert_close(ours(x, routing), theirs(x, routing), rtol=1e-3, atol=1e-4)

    def force(strategy: Strategy) -> Callable[[], Tensor]:
        return lambda: condconv2d(
            x, ours.weight, routing, stride=row.stride, padding=padding, groups=row.groups,
            strategy=strategy,
        )  # fmt: skip

    return {
        "condconv": lambda: ours(x, routing),
        "timm": lambda: theirs(x, routing),
        "static": lambda: static(x),
        "mixing": lambda: routing @ ours.weight.flatten(1),
        **{strategy: force(strategy) for strategy in get_args(Strategy)},
    }


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            run()

    return forward


def with_backward(run: Callable[[], Tensor]) -> Callable[[], object]:
    with torch.no_grad():
        grad = torch.randn_like(run())
    return lambda: run().backward(grad)


def bench_row(row: Row, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    sides = build_sides(row, batch, args.device, memory_format)
    if not args.strategies:
        sides = {name: run for name, run in sides.items() if name not in get_args(Strategy)}
    if batch > 1:  # only the summary of single images asks for it
        del sides["mixing"]
    forward = measure(
        {name: without_gradients(run) for name, run in sides.items()},
        seconds=args.seconds,
        device=args.device,
    )
    trained = {name: run for name, run in sides.items() if name != "mixing"}
    training = measure(
        {name: with_backward(run) for name, run in trained.items()},
        seconds=args.seconds,
        device=args.device,
    )
    peaks = {
        name: measure_peak(with_backward(sides[name]), args.device) for name in ("condconv", "timm")
    }
    return {
        "row": str(row),
        "family": row.family,
        "batch": batch,
        "forward_ms": forward,
        "training_ms": training,
        "peak_bytes": peaks,
    }


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def ratio(times: dict[str, float], side: str) -> float:
    """How many times as much `side` takes as CondConv2d."""
    return times[side] / times["condconv"]


def print_row(result: dict[str, Any]) -> None:
    forward, training, peaks = result["forward_ms"], result["training_ms"], result["peak_bytes"]
    line = f"{result['row']:32} B{result['batch']:<3}"
    for times in (forward, training):
        line += f" {times['condconv']:8.2f} ms {ratio(times, 'timm'):5.2f}"
        line += f" {ratio(times, 'static'):5.2f}"
    line += f" {1 / ratio(peaks, 'timm'):7.2f}"
    for strategy in get_args(Strategy):
        if strategy in forward:
            line += f"  {strategy} {forward[strategy]:.2f} / {training[strategy]:.2f}"
    print(line, flush=True)


def print_summary(results: list[dict[str, Any]]) -> None:
    batched = [result for result in results if result["batch"] >= 8]
    families = dict.fromkeys(result["family"] for result in batched)
    print("\nGeometric means against timm, batch 8 and more: forward, forward + backward, memory")
    for family in [*families, None]:
        chosen = [result for result in batched if family in (None, result["family"])]
        if chosen:
            forward = geometric_mean(ratio(r["forward_ms"], "timm") for r in chosen)
            training = geometric_mean(ratio(r["training_ms"], "timm") for r in chosen)
            memory = geometric_mean(1 / ratio(r["peak_bytes"], "timm") for r in chosen)
            print(f"{family or 'all rows':32} {forward:5.2f} {training:5.2f} {memory:5.2f}")
    single = [result["forward_ms"] for result in results if result["batch"] == 1]
    if single:
        mean = geometric_mean(t["condconv"] / (t["static"] + t["mixing"]) for t in single)
        print(f"batch 1: {mean:.2f} x (static convolution + mixing)")


def bench_detector(args: argparse.Namespace) -> list[dict[str, Any]]:
    """SSD300 MobileNetV1 with 8 experts against the static one: latency and multiply-adds."""
    networks = {
        name: ssd_mobilenet_v1(num_classes=90, num_experts=num_experts).eval().to(args.device)
        for name, num_experts in (("static", 1), ("condconv", NUM_EXPERTS))
    }
    if args.channels_last:
        for network in networks.values():
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    image = torch.zeros(1, 3, 300, 300, device=args.device)
    costs = {name: count_multiply_adds(network, image) for name, network in networks.items()}
    results = []
    for batch in (1, 8) if args.quick else (1, 8, 32):
        images = torch.randn(batch, 3, 300, 300, device=args.device)
        sides = {
            name: without_gradients(lambda network=network, images=images: network(images)[0])
            for name, network in networks.items()
        }
        times = measure(sides, seconds=4 * args.seconds, device=args.device)
        print(
            f"SSD300 MobileNetV1 1.0x, 8 experts, batch {batch}: {times['condconv']:.0f} ms, "
            f"{times['condconv'] / times['static']:.3f} x static (multiply-adds: "
            f"{costs['condconv'] / costs['static']:.3f} x)",
            flush=True,
        )
        results.append({"batch": batch, "forward_ms": times, "multiply_adds": costs})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rows, batch 1 and 8, short")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="for each row and pass (2, quick 0.5)")
    parser.add_argument("--batches", type=int, nargs="+", help="(1 2 8 32, quick 1 8)")
    parser.add_argument("--family", help="only the rows of this family")
    parser.add_argument("--others", action="store_true", help="other rows in their place")
    parser.add_argument("--channels-last", action="store_true", help="inputs in that format")
    parser.add_argument("--strategies", action="store_true", help="time every strategy too")
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory (glibc)")
    parser.add_argument("--no-detector", action="store_true", help="leave the whole SSD out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args()
    args.seconds = args.seconds or (0.5 if args.quick else 2.0)
    torch.set_num_threads(args.threads)
    if args.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: the C library cannot")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, float32, 8 experts")
    print(
        f"{'':37} {'forward':>11} {'timm':>5} {'stat.':>5} "
        f"{'+ backward':>11} {'timm':>5} {'stat.':>5} {'memory':>7}"
    )
    results = []
    rows = OTHER_ROWS if args.others else QUICK_ROWS if args.quick else ROWS
    for row in rows:
        if args.family in (None, row.family):
            for batch in args.batches or ((1, 8) if args.quick else (1, 2, 8, 32)):
                results.append(bench_row(row, batch, args))
                print_row(results[-1])
    print_summary(results)
    detector = [] if args.no_detector else bench_detector(args)
    if args.output:
        args.output.write_text(json.dumps({"rows": results, "detector": detector}, indent=2))


if __name__ == "__main__":
    main()
