"""Latency and throughput of detectors as they would be deployed, on this CPU, random weights.

    python benchmarks/bench_deploy.py [--rows ROW ...] [--threads 2] [--profile] [--quick]

Median and 95th percentile in milliseconds at batch 1, images per second at batch 8, for the raw
outputs of a network with float32 images. The networks and runtimes of a row run in turn, round
after round, so that a busy moment hits them alike; threads of a runtime that waits do not spin.
INT8 is calibrated with noise: its speed is measured, not its accuracy. Beside them stands the time
in which two threads only read the experts, as any runtime must for each image. `--profile` also
prints where ONNX Runtime's time goes, by operator.

The exit status is 1 where 8 experts take more than 1.10 times static's time in ONNX Runtime at
batch 1. `--quick` only shows that it runs: a few calls, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from condconv import CondConv2d, count_multiply_adds
from detection.build import build_model
from detection.config import config_dir, plain
from detection.export.formats import ExportedDetector, export_onnx
from detection.export.quantization import quantize_onnx

MAX_RATIO = 1.10
SIDES = ("eager", "compile", "onnxruntime", "onnxruntime int8", "openvino")


class Network(nn.Module):
    """Another project's detector, images in and raw tensors out, as an `ExportedDetector`."""

    outputs = "raw"

    def __init__(self, run: Callable[[Tensor], Any], network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size, self.run = network.eval(), size, run

    def forward(self, images: Tensor) -> Any:
        return self.run(images)

    def example(self) -> Tensor:
        return torch.zeros(2, 3, self.size, self.size)


def ours(*overrides: str) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = plain(compose("train", overrides=list(overrides)))["model"]
    parts = build_model(config, num_classes=80)
    return ExportedDetector(parts, images="float32", outputs="raw")


def torchvision_ssdlite() -> Any:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    network = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=81)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        found = network.head(list(network.backbone(images).values()))
        return found["bbox_regression"], found["cls_logits"].softmax(-1)

    return Network(run, network, 320)


def efficientdet_d0() -> Any:
    try:
        from effdet import create_model
    except ImportError as error:
        raise SystemExit(
            "the row EfficientDet-D0 needs effdet: pip install effdet, or name the other --rows"
        ) from error

    network = create_model("efficientdet_d0", pretrained=False, pretrained_backbone=False)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        classes, boxes = network(images)
        return tuple(
            torch.cat([level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, last))
                       for level in levels], 1)
            for levels, last in ((boxes, 4), (classes, 90))
        )  # fmt: skip

    return Network(run, network, 512)


def static_and_conditional(*overrides: str) -> dict[str, Callable[[], Any]]:
    return {
        name: functools.partial(ours, *overrides, f"model.num_experts={number}")
        for name, number in (("static", 1), ("8 experts", 8))
    }


READING = ("8 experts", "reading")  # each expert once: the least that an image can cost

ROWS: dict[str, dict[str, Callable[[], Any]]] = {
    **{
        f"SSD300 {width}x": static_and_conditional(
            "model=ssd300_mobilenet_v1", f"model.width={width}"
        )
        for width in (0.5, 0.75, 1.0)
    },
    "RetinaNet-lite": static_and_conditional("model=retinanet_mobilenet_v1_fpnlite"),
    "torchvision ssdlite320": {"": torchvision_ssdlite},
    "EfficientDet-D0": {"": efficientdet_d0},
}


def start(file: Path, threads: int, **settings: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(file, options)


def profile(file: Path, images: Tensor, threads: int, runs: int = 50) -> dict[str, float]:
    """Milliseconds of the operators in one run of ONNX Runtime, without those that hold others."""
    prefix = str(file.with_name("profile"))
    session = start(file, threads, enable_profiling=True, profile_file_prefix=prefix)
    for _ in range(runs):
        session.run(None, {"images": images.numpy()})
    times: dict[str, float] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        operator = event.get("args", {}).get("op_name", "Scan")
        if event["name"].endswith("_kernel_time") and operator != "Scan":
            times[operator] = times.get(operator, 0) + event["dur"] / 1000 / runs
    return times


def build_sides(
    model: Any, folder: Path, sides: list[str], threads: int
) -> dict[str, Callable[[Tensor], Any]]:
    folder.mkdir(exist_ok=True)
    file = folder / "model.onnx"
    export_onnx(model, {}, file)
    found: dict[str, Callable[[Tensor], Any]] = {}
    if "eager" in sides:
        found["eager"] = model
    if "compile" in sides:
        found["compile"] = torch.compile(model)
    if "onnxruntime" in sides:
        session = start(file, threads)
        found["onnxruntime"] = lambda x: session.run(None, {"images": x.numpy()})
    if "onnxruntime int8" in sides:
        noise = [np.random.default_rng(i).standard_normal(model.example()[:1].shape, np.float32)
                 for i in range(4)]  # fmt: skip
        quantize_onnx(file, noise, folder / "int8.onnx")
        integer = start(folder / "int8.onnx", threads)
        found["onnxruntime int8"] = lambda x: integer.run(None, {"images": x.numpy()})
    if "openvino" in sides:
        import openvino

        core = openvino.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
        compiled = core.compile_model(openvino.convert_model(file), "CPU",
                                      {"INFERENCE_PRECISION_HINT": "f32"})  # fmt: skip
        found["openvino"] = lambda x: compiled([x.numpy()])
    return found


def time_rounds(
    sides: dict[Any, Callable[[Tensor], Any]], images: Tensor, seconds: float
) -> dict[Any, list[float]]:
    """Milliseconds of each call, the sides in turn, after two calls to warm up."""
    times: dict[Any, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run(images)
        run(images)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < 5:
        for name, run in sides.items():
            start_time = time.perf_counter()
            run(images)
            times[name].append((time.perf_counter() - start_time) * 1000)
    return times


@torch.no_grad()
def bench(row: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    sides, costs = {}, {}
    experts = torch.empty(0)
    single = batch = torch.empty(0)
    for name, make in ROWS[row].items():
        torch.manual_seed(0)
        model = make().eval()
        single, batch = (torch.randn(n, *model.example().shape[1:]) for n in (1, 8))
        costs[name] = count_multiply_adds(model.network, single)
        layers = [child for child in model.modules() if isinstance(child, CondConv2d)]
        experts = torch.cat([experts, *(layer.weight.flatten() for layer in layers)])
        for side, run in build_sides(model, folder / name, args.sides, args.threads).items():
            sides[name, side] = run
        for file in sorted((folder / name).glob("*.onnx")) if args.profile else ():
            times = profile(file, single, args.threads)
            longest = sorted(times, key=lambda operator: -times[operator])[:6]
            print(f"{row} {name}, {file.stem}: {sum(times.values()):.1f} ms, of it "
                  + ", ".join(f"{operator} {times[operator]:.1f}" for operator in longest),
                  flush=True)  # fmt: skip
    # In turn with the others, which leave as little of them in the cache as they find themselves.
    timed = dict(sides)
    if len(experts) and "onnxruntime" in args.sides:
        timed[READING] = lambda _: experts.view(torch.int64).sum()
    latency = time_rounds(timed, single, args.seconds)
    throughput = time_rounds(sides, batch, args.seconds)
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for name, side in sorted(sides, key=lambda key: args.sides.index(key[1])):
        median, p95 = np.percentile(latency[name, side], [50, 95])
        rate = 8000 / float(np.median(throughput[name, side]))
        results[name, side] = {
            "row": row, "network": name, "side": side, "median": median, "p95": p95,
            "images_per_second": rate, "multiply_adds": costs[name],
        }  # fmt: skip
        print(
            f"| {row} {name} | {costs[name] / 1e6:.0f} | {side} "
            f"| {median:.1f} | {p95:.1f} | {rate:.1f} |",
            flush=True,
        )
    for side in args.sides if {"static", "8 experts"} <= costs.keys() else ():
        pairs = zip(latency["8 experts", side], latency["static", side], strict=True)
        low, middle, high = np.percentile([own / other for own, other in pairs], [25, 50, 75])
        results["8 experts", side]["ratio"] = float(middle)
        print(
            f"{row}, {side}, batch 1: 8 experts take {middle:.2f} times static's "
            f"({low:.2f} to {high:.2f} in half of the rounds)",
            flush=True,
        )
        if side == "onnxruntime":
            milliseconds = float(np.median(latency[READING]))
            print(
                f"{row}: reading the {experts.nbytes / 1e6:.0f} MB of experts alone takes "
                f"{milliseconds:.1f} ms, {milliseconds / np.median(latency['static', side]):.2f} "
                "times static's",
                flush=True,
            )
    return list(results.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="of each row and batch size")
    parser.add_argument("--profile", action="store_true", help="by operator, in ONNX Runtime")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    parser.add_argument("--quick", action="store_true", help="a few calls, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds = 0
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {args.threads} threads"
    )
    print("| model | million multiply-adds | runtime | median ms | 95 % ms | images/s, batch 8 |")
    print("|---|---:|---|---:|---:|---:|")
    results = []
    for row in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            results += bench(row, args, Path(folder))
        torch.compiler.reset()
    if args.output:
        args.output.write_text(json.dumps(results, indent=2))
    missed = {
        result["row"]: result["ratio"]
        for result in results
        if result["side"] == "onnxruntime" and result.get("ratio", 0) > MAX_RATIO
    }
    for row, ratio in missed.items():
        print(f"{row}: {ratio:.2f} is more than {MAX_RATIO:.2f}, which is asked for")
    return int(bool(missed) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
