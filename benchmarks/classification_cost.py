"""What the paper's classification networks cost here, beside the authors' own figures.

    python benchmarks/classification_cost.py [--modules NETWORK]

Multiply-adds count convolutions, linear layers, kernel mixing and routing for one 224 x 224 image
and ImageNet's 1,000 classes. The authors' figures for EfficientNet, static or not, lie above: they
also hold half a multiply-add for each element in swish, in the pooling and the scaling of
squeeze-and-excitation, and in the shortcuts. `--modules` adds the table of one network, module by
module. Exits with status 1 where a figure is off by more than 2 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

from condconv import ModuleCost, RoutedCondConv2d, convert_to_condconv, cost_table
from condconv.backbones import MobileNetV1

NUM_CLASSES = 1000
TOLERANCE = 0.02


class MobileNetV1Classifier(nn.Module):
    """With experts, the classifier is conditional as well as the separable blocks 6 to 13."""

    def __init__(self, num_experts: int = 1) -> None:
        super().__init__()
        self.backbone = MobileNetV1(num_experts=num_experts)
        channels = self.backbone.feature_channels[-1]
        self.classifier = (
            conditional_classifier(channels, num_experts)
            if num_experts > 1
            else nn.Linear(channels, NUM_CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> logits (B, K)."""
        return self.classifier(self.backbone(images)[-1].mean(dim=(2, 3)))


def conditional_classifier(channels: int, num_experts: int) -> nn.Module:
    """Pooled features (B, C) -> logits (B, K): a linear layer is a convolution of one position."""
    return nn.Sequential(
        nn.Unflatten(1, (channels, 1, 1)),
        RoutedCondConv2d(channels, NUM_CLASSES, 1, num_experts=num_experts),
        nn.Flatten(),
    )


def conditional_resnet50(num_experts: int) -> nn.Module:
    """The last 3 residual blocks, each with one routing, and the classifier.

    Of a block the three convolutions of its residual branch; the projection of the shortcut stays
    static: with it and without the classifier would fit the paper's figure as well.
    """
    network = convert_to_condconv(
        resnet50(),
        num_experts,
        where=lambda name, _: name.startswith("layer4.") and ".conv" in name,
        share_within=lambda _, module: isinstance(module, Bottleneck),
        from_scratch=True,
    )
    network.fc = conditional_classifier(network.fc.in_features, num_experts)
    return network


class PaperRow(NamedTuple):
    """A network, and what the authors say of it: both in millions."""

    name: str
    build: Callable[[], nn.Module]
    multiply_adds: float
    parameters: float | None = None


# The paper's text and tables; EfficientNet-CondConv: the README of the authors' code. Their "B0
# depth" has B1's layers, which timm names it by, and B0's image size.
PAPER = (
    PaperRow("mobilenet_v1", MobileNetV1Classifier, 567),
    PaperRow("mobilenet_v1_8e", partial(MobileNetV1Classifier, num_experts=8), 600),
    PaperRow("resnet50", resnet50, 4093),
    PaperRow("resnet50_8e", partial(conditional_resnet50, num_experts=8), 4213),
    PaperRow("tf_efficientnet_b0", partial(timm.create_model, "tf_efficientnet_b0"), 391, 5.3),
    *(
        PaperRow(name, partial(timm.create_model, name), multiply_adds, parameters)
        for name, multiply_adds, parameters in (
            ("tf_efficientnet_cc_b0_4e", 402, 13.3),
            ("tf_efficientnet_cc_b0_8e", 413, 24.0),
            ("tf_efficientnet_cc_b1_8e", 614, 39.7),
        )
    ),
)


def measure(row: PaperRow) -> list[ModuleCost]:
    """What each module of the network costs."""
    # Shapes are enough: nothing is computed.
    with torch.device("meta"):
        return cost_table(row.build(), torch.zeros(1, 3, 224, 224))


def total(rows: list[ModuleCost]) -> tuple[float, float]:
    """Multiply-adds and parameters, both in millions."""
    return sum(row.multiply_adds for row in rows) / 1e6, sum(row.parameters for row in rows) / 1e6


def print_modules(rows: list[ModuleCost], console: Console) -> None:
    """Print the table of one network."""
    table = Table("name", "type")
    for column in ("multiply-adds", "parameters"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.name, row.type, f"{row.multiply_adds:,}", f"{row.parameters:,}")
    console.print(table)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modules", choices=[row.name for row in PAPER], metavar="NETWORK")
    chosen = parser.parse_args().modules
    console = Console()
    table = Table(
        title="Classification networks of the paper",
        caption="MAdds: multiply-adds; params: parameters; all in millions",
    )
    table.add_column("network", no_wrap=True)
    for column in ("paper MAdds", "MAdds", "diff.", "paper params", "params"):
        table.add_column(column, justify="right")
    far = []
    for row in PAPER:
        costs = measure(row)
        multiply_adds, parameters = total(costs)
        difference = multiply_adds / row.multiply_adds - 1
        if abs(difference) > TOLERANCE or (
            row.parameters and abs(parameters / row.parameters - 1) > TOLERANCE
        ):
            far.append(row.name)
        table.add_row(
            row.name,
            f"{row.multiply_adds:,.0f}",
            f"{multiply_adds:,.1f}",
            f"{difference:+.2%}",
            f"{row.parameters}" if row.parameters else "",
            f"{parameters:.2f}",
        )
        if row.name == chosen:
            print_modules(costs, console)
    console.print(table)
    if far:
        sys.exit(f"further than {TOLERANCE:.0%} from the paper: {', '.join(far)}")


if __name__ == "__main__":
    main()
