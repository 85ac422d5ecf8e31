"""timm's EfficientNet-CondConv as it is, and with our layers in the place of timm's.

    python benchmarks/bench_efficientnet.py [--quick] [--threads 2] [--device cuda] [--output FILE]

Both have the same weights; that they compute the same, to 1e-4 of the largest output, is checked
first. All sides run in each round, in a new order each time; times are medians over the rounds. A
ratio above 1 means that ours is faster. timm's network runs as it comes and laid out channels last,
as ours is by `accelerate_timm`. The static EfficientNet-B0, channels last, runs beside them: the
physical reference.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from bench_condconv import geometric_mean, measure, ratio, without_gradients
from torch import Tensor, nn

from condconv import accelerate_timm, count_multiply_adds, count_parameters

SIZE = 224
SIDES = ("timm", "timm, channels last", "static")
TOLERANCE = 1e-4


def build_networks(name: str, device: str) -> dict[str, nn.Module]:
    theirs = timm.create_model(name).to(device)
    # Random weights under batch norm's start would fade away layer by layer.
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        theirs.train()(torch.randn(8, 3, SIZE, SIZE, device=device))
    ours = accelerate_timm(copy.deepcopy(theirs))
    relaid, static = (
        network.to(memory_format=torch.channels_last)
        for network in (copy.deepcopy(theirs), timm.create_model("tf_efficientnet_b0").to(device))
    )
    return {"condconv": ours, "timm": theirs, "timm, channels last": relaid, "static": static}


def check_equal(networks: dict[str, nn.Module], device: str) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    difference = 0.0
    for batch in (1, 8):
        images = torch.randn(batch, 3, SIZE, SIZE, device=device)
        with torch.no_grad():
            ours, theirs = (networks[name].eval()(images) for name in ("condconv", "timm"))
        difference = max(difference, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the outputs differ by {difference:.1e} of the largest one")
    return difference


def build_inference(network: nn.Module, images: Tensor) -> Callable[[], object]:
    network.eval()
    return without_gradients(lambda: network(images))


def build_step(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """A training step: forward, backward, SGD with momentum."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.arange(len(images), device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def bench(
    networks: dict[str, nn.Module], batch: int, training: bool, args: argparse.Namespace
) -> dict[str, Any]:
    images = torch.randn(batch, 3, SIZE, SIZE, device=args.device)
    build = build_step if training else build_inference
    sides = {name: build(network, images) for name, network in networks.items()}
    times = measure(sides, seconds=args.seconds, device=args.device)
    row = f"{'training step' if training else 'inference'}, batch {batch}"
    print(
        f"{row:24} {times['condconv']:9.1f} ms "
        + " ".join(f"{ratio(times, side):20.2f}" for side in SIDES),
        flush=True,
    )
    return {"row": row, "milliseconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="tf_efficientnet_cc_b0_8e", help="a name of timm's")
    parser.add_argument("--quick", action="store_true", help="smaller batches, short")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="for each row (20, quick 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args()
    args.seconds = args.seconds or (2.0 if args.quick else 20.0)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    networks = build_networks(args.network, args.device)
    print(
        f"{args.network}, {SIZE} x {SIZE}, torch {torch.__version__}, {args.device}, "
        f"{args.threads} threads, float32"
    )
    print(f"outputs equal to {check_equal(networks, args.device):.1e} of the largest one")
    image = torch.zeros(1, 3, SIZE, SIZE, device=args.device)
    for name, network in networks.items():
        print(
            f"{name:20} {count_multiply_adds(network, image) / 1e6:6.1f} M multiply-adds "
            f"{count_parameters(network) / 1e6:6.2f} M parameters"
        )
    print(f"\n{'':24} {'condconv':>12} " + " ".join(f"{side + ' /':>20}" for side in SIDES))
    inference, training = ((1, 8), 4) if args.quick else ((1, 8, 32), 16)
    results = [bench(networks, batch, False, args) for batch in inference]
    results.append(bench(networks, training, True, args))
    print()
    for side in SIDES[:2]:
        ratios = {result["row"]: ratio(result["milliseconds"], side) for result in results}
        slowest = min(ratios, key=lambda row: ratios[row])
        print(
            f"against {side}: geometric mean {geometric_mean(ratios.values()):.2f}, "
            f"lowest {ratios[slowest]:.2f} ({slowest})"
        )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
