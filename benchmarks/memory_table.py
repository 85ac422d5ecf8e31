"""What training takes of a GPU's memory: prints the table of docs/scaling.md.

    python benchmarks/memory_table.py

Fixed is what does not grow with the batch: weights, gradients, AdamW's two moments and the moving
average, all float32 (SGD with momentum keeps one moment). An image adds what autograd keeps for the
backward pass, each storage counted once, by shapes alone and the execution that a CPU takes;
workspaces and fragments come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from detection.build import build_model
from detection.cli import config_dir, plain
from detection.structures import RawPredictions, Targets

NUM_CLASSES = 80
NUM_COPIES = 5  # weights, gradients, two moments, moving average
# As they are given to train_det.py.
MODELS = (
    "model=ssd300_mobilenet_v1 model.num_experts=1",
    "model=ssd300_mobilenet_v1",
    "model=ssd300_mobilenet_v1 model.width=0.5",
    "model=ssdlite320_mobilenet_v1",
    "model=retinanet_mobilenet_v1_fpnlite",
    "model=retinanet",
)


def measure_saved(module: nn.Module, *inputs: Any) -> int:
    """Bytes that autograd keeps of a forward pass, parameters and buffers left out."""
    known = {id_of(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    saved: dict[int, Tensor] = {}  # they stay alive, so that no storage takes another's place

    def note(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in known:
            saved[id_of(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure_loss(criterion: nn.Module, predictions: RawPredictions, count: int) -> int:
    """`measure_saved` of the loss of `count` images with a box each."""
    shapes = [(count, *field.shape[1:]) for field in (predictions.deltas, predictions.logits)]
    deltas, logits = (torch.zeros(shape, requires_grad=True) for shape in shapes)
    boxes = predictions.anchors[:1].expand(count, 1, 4)
    ones = torch.ones(count, 1)
    targets = Targets(boxes, ones.long(), ones.bool())
    return measure_saved(criterion, predictions._replace(deltas=deltas, logits=logits), targets)


def describe(overrides: str) -> str:
    """A row of the table."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = plain(compose("train", overrides=overrides.split()))["model"]
    size = config["input_size"]
    real = build_model(config, NUM_CLASSES)
    with torch.no_grad():
        predictions = real.network.eval()(torch.zeros(1, 3, size, size))
    loss = measure_loss(real.criterion, predictions, 4) - measure_loss(
        real.criterion, predictions, 2
    )
    growth = []
    with FakeTensorMode():  # shapes are enough
        network = build_model(config, NUM_CLASSES).network.train()
        network.to(memory_format=torch.channels_last)  # pyright: ignore
        fixed = NUM_COPIES * sum(4 * parameter.numel() for parameter in network.parameters())
        for bf16 in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                few, more = (
                    measure_saved(network, torch.empty(count, 3, size, size)) for count in (2, 4)
                )
            growth.append((more - few + loss) / 2 / 2**20)
    return f"| `{overrides}` | {fixed / 2**20:,.0f} | {growth[0]:,.1f} | {growth[1]:,.1f} |"


def make_table(models: Sequence[str] = MODELS) -> str:
    """The table in Markdown."""
    head = [
        "| overrides | fixed, MiB | an image in fp32, MiB | an image in bf16, MiB |",
        "|---|--:|--:|--:|",
    ]
    return "\n".join([*head, *map(describe, models)])


if __name__ == "__main__":
    print(make_table())
