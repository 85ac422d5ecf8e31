"""What CondConv brings: networks with experts against static ones, in pairs.

    python benchmarks/condconv_vs_static.py [--seeds 0,1,2,3,4] [--num-experts 8] \\
        [--output DIR] [group=option ...] [key=value ...]

The overrides are those of train_det.py, and hold for both sides:

    python benchmarks/condconv_vs_static.py --output runs/shapes model.width=0.25
    python benchmarks/condconv_vs_static.py --output runs/cells --seeds 0,1,2 experiment=bccd \\
        model.width=0.25 data.train.images=DIR data.train.annotations=FILE \\
        data.val.images=DIR data.val.annotations=FILE

A pair has the same recipe, data and seed, and so the same images in the same order; both take all
steps, early stopping is off. The AP is that of the last step: the best of several evaluations would
be chosen on the very images that it is measured on. Finished runs are kept and unfinished ones
taken up again: the same command goes on where it was stopped, and with more seeds it trains only
those.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir

from condconv import count_multiply_adds
from detection.checkpoint import load_checkpoint, load_model
from detection.cli import fail
from detection.config import config_dir, plain
from detection.engine.run_folder import RunFolder
from detection.errors import UserError
from detection.overrides import check_overrides
from train_det import train

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; the last for all above,
# where it makes the interval a little too wide.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
# What may differ between a finished run and one asked for now.
FREE_KEYS = {"run_dir", "resume"}


class Run(NamedTuple):
    """A finished run.

    Args:
        average_precision: of the last step.
        seconds: of the training steps, evaluations left out.
        multiply_adds: of one image.
    """

    average_precision: float
    seconds: float
    multiply_adds: int


class Summary(NamedTuple):
    """Mean and sample standard deviation, and the 95 % t-interval of the mean."""

    mean: float
    deviation: float
    low: float
    high: float


def summarize(values: Sequence[float]) -> Summary:
    """Of two values or more; of paired differences, the interval is that of the paired t-test."""
    mean, deviation, count = statistics.fmean(values), statistics.stdev(values), len(values)
    half = T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1] * deviation / math.sqrt(count)
    return Summary(mean, deviation, mean - half, mean + half)


def read_run(folder: RunFolder, config: Mapping[str, Any]) -> Run | None:
    """A run that came to its end, None where there is none or an unfinished one.

    Raises:
        UserError: where the folder holds a run of another config.
    """
    if not folder.config.exists():
        return None
    saved = plain(folder.read_config())
    changed = [key for key in config.keys() - FREE_KEYS if saved.get(key) != config[key]]
    if changed:
        raise UserError(
            f"{folder.path} holds a run with other {', '.join(sorted(changed))}: "
            "give another --output"
        )
    if not folder.last.exists():
        return None
    checkpoint = load_checkpoint(folder.last)
    if checkpoint["step"] < config["trainer"]["steps"]:
        return None
    lines = [json.loads(line) for line in folder.metrics_lines.read_text().splitlines()]
    size = config["model"]["input_size"]
    multiply_adds = count_multiply_adds(
        load_model(checkpoint).network, torch.zeros(1, 3, size, size)
    )
    seconds = measure_training(lines, config["trainer"]["batch_size"])
    return Run(lines[-1]["AP"], seconds, multiply_adds)


def measure_training(lines: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """Seconds that the training steps took, from the lines of metrics.jsonl."""
    seconds, last_step = 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            seconds += (line["step"] - last_step) * batch_size / line["images_per_second"]
            last_step = line["step"]
    return seconds


def train_run(path: Path, overrides: Sequence[str]) -> Run:
    """The run of a folder, trained or trained to its end where that is still to be done."""
    overrides = [*overrides, "trainer.early_stopping=null", f"run_dir={path}"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=overrides)
    content = plain(config)
    folder = RunFolder(path)
    run = read_run(folder, content)
    if run is not None:
        return run
    if folder.last.exists():
        config.resume = True
    else:
        # A run that was stopped before its first checkpoint starts anew.
        folder.config.unlink(missing_ok=True)
    train(config, overrides=["resume=true"] if config.resume else [])
    run = read_run(folder, content)
    if run is None:
        sys.exit("stopped: the same command goes on from here")
    return run


def describe(
    static: Sequence[Run], condconv: Sequence[Run], seeds: Sequence[int], num_experts: int
) -> str:
    """The comparison as Markdown tables; runs in the order of the seeds."""
    rows = [
        "| network | multiply-adds | AP, mean | AP, deviation | training, seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, runs in (("static", static), (f"CondConv, {num_experts} experts", condconv)):
        summary = summarize([run.average_precision for run in runs])
        seconds = statistics.fmean(run.seconds for run in runs)
        rows.append(
            f"| {name} | {runs[0].multiply_adds / 1e6:.1f}M | {summary.mean:.4f} "
            f"| {summary.deviation:.4f} | {seconds:.0f} |"
        )
    pairs = list(zip(static, condconv, strict=True))
    differences = [b.average_precision - a.average_precision for a, b in pairs]
    summary = summarize(differences)
    cost = condconv[0].multiply_adds / static[0].multiply_adds - 1
    time = sum(run.seconds for run in condconv) / sum(run.seconds for run in static) - 1
    rows += [
        f"| paired difference | {cost:+.1%} | {summary.mean:+.4f} | {summary.deviation:.4f} "
        f"| {time:+.0%} |",
        "",
        f"95 % interval of the paired difference: {summary.low:+.4f} to {summary.high:+.4f} "
        f"(t, {len(pairs)} pairs).",
        "",
        "| seed | static AP | CondConv AP | difference |",
        "|--:|--:|--:|--:|",
    ]
    rows += [
        f"| {seed} | {a.average_precision:.4f} | {b.average_precision:.4f} | {difference:+.4f} |"
        for seed, (a, b), difference in zip(seeds, pairs, differences, strict=True)
    ]
    return "\n".join(rows)


def read_seeds(text: str) -> list[int]:
    """At least two different seeds, such as "0,1,2"."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = []
    if len(set(seeds)) < max(len(seeds), 2):
        raise argparse.ArgumentTypeError("give two different seeds or more, such as 0,1,2")
    return seeds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train networks with experts and static ones in pairs, and compare their AP."
    )
    parser.add_argument("--seeds", type=read_seeds, default="0,1,2,3,4", help="such as 0,1,2")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/condconv_vs_static"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train_det.py")
    options = parser.parse_intermixed_args(arguments)
    if options.num_experts < 2:
        parser.error("--num-experts: give at least 2, one expert is the static network")
    static: list[Run] = []
    condconv: list[Run] = []
    try:
        overrides = check_overrides("train", options.overrides)
        for seed in options.seeds:
            for num_experts, runs in ((1, static), (options.num_experts, condconv)):
                own = [f"seed={seed}", f"model.num_experts={num_experts}"]
                path = options.output / f"{num_experts}_experts_seed_{seed}"
                runs.append(train_run(path, [*overrides, *own]))
    except UserError as error:
        fail(error)
    print(describe(static, condconv, options.seeds, options.num_experts))


if __name__ == "__main__":
    main()
