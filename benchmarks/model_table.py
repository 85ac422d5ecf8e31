"""What the shipped detectors cost: prints the table of docs/models.md.

    python benchmarks/model_table.py

Multiply-adds count convolutions, kernel mixing and routing for one image of the model's input size;
80 classes, which COCO's annotations have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir

from condconv import count_multiply_adds, count_parameters
from detection.build import build_model
from detection.config import config_dir, plain

NUM_CLASSES = 80
# As they are given to train_det.py.
MODELS = (
    "model=ssd300_mobilenet_v1 model.num_experts=1",
    "model=ssd300_mobilenet_v1",
    "model=ssd300_mobilenet_v1 model.width=0.5",
    "model=ssdlite320_mobilenet_v1 model.num_experts=1",
    "model=ssdlite320_mobilenet_v1",
    "model=ssdlite320_mobilenet_v1 model.width=0.5",
    "model=ssdlite320_mobilenet_v1 model/backbone=mobilenet_v2 model.num_experts=1",
    "model=ssdlite320_mobilenet_v1 model/backbone=mobilenet_v2",
    "model=ssdlite320_mobilenet_v1 model/backbone=efficientnet_cc_b0",
    "model=ssdlite320_mobilenet_v1 model/backbone=timm model.backbone.name=mobilenetv3_large_100 "
    "model.num_experts=1",
    "model=retinanet_mobilenet_v1_fpnlite model.num_experts=1",
    "model=retinanet_mobilenet_v1_fpnlite",
    "model=retinanet_mobilenet_v1_fpnlite model.width=0.5",
    "model=retinanet_mobilenet_v1_fpnlite model/backbone=mobilenet_v2",
    "model=retinanet_mobilenet_v1_fpnlite model/backbone=efficientnet_cc_b0",
    "model=retinanet",
    "model=retinanet model.num_experts=8",
    "model=retinanet model.backbone.num_experts=8",
    "model=retinanet model.backbone.name=resnet18",
)


def describe(overrides: str) -> str:
    """A row of the table."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = plain(compose("train", overrides=overrides.split()))["model"]
    size = config["input_size"]
    with torch.device("meta"):  # shapes are enough
        network = build_model(config, NUM_CLASSES).network
        multiply_adds = count_multiply_adds(network, torch.zeros(1, 3, size, size))
    parameters = count_parameters(network)
    return f"| `{overrides}` | {size} | {multiply_adds / 1e6:,.0f}M | {parameters / 1e6:.2f}M |"


def make_table(models: Sequence[str] = MODELS) -> str:
    """The table in Markdown."""
    head = ["| overrides | input | multiply-adds | parameters |", "|---|--:|--:|--:|"]
    return "\n".join([*head, *map(describe, models)])


if __name__ == "__main__":
    print(make_table())
