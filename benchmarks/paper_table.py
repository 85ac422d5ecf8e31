"""What the paper's six detectors cost here, beside the paper's own figures.

python benchmarks/paper_table.py

Multiply-adds count convolutions, kernel mixing and routing for one 300 x 300 image, with COCO's 90
class ids and background, as the paper does. Exits with status 1 where one is off by more than 1 %.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from condconv import count_multiply_adds, count_parameters
from detection.models.ssd import ssd_mobilenet_v1


class PaperRow(NamedTuple):
    """A detector of the paper: mAP on COCO minival, multiply-adds in millions."""

    width: float
    num_experts: int
    mean_ap: float
    multiply_adds: float


# SSD300 MobileNetV1 in the paper's table of COCO results.
PAPER = (
    PaperRow(0.5, 1, 14.4, 352),
    PaperRow(0.5, 8, 18.0, 363),
    PaperRow(0.75, 1, 18.2, 730),
    PaperRow(0.75, 8, 21.0, 755),
    PaperRow(1.0, 1, 20.3, 1230),
    PaperRow(1.0, 8, 22.4, 1280),
)
TOLERANCE = 0.01


def measure(width: float, num_experts: int) -> tuple[float, float]:
    """Multiply-adds and parameters, both in millions."""
    # Shapes are enough: nothing is computed.
    with torch.device("meta"):
        network = ssd_mobilenet_v1(num_classes=90, width=width, num_experts=num_experts)
        multiply_adds = count_multiply_adds(network, torch.zeros(1, 3, 300, 300))
    return multiply_adds / 1e6, count_parameters(network) / 1e6


def main() -> None:
    """Print the table."""
    table = Table(
        title="SSD300 MobileNetV1 on COCO: the paper's detectors",
        caption="MAdds: multiply-adds; M: millions",
    )
    for column in (
        "width",
        "experts",
        "paper mAP",
        "paper MAdds",
        "MAdds",
        "difference",
        "parameters",
    ):
        table.add_column(column, justify="right")
    all_near = True
    for row in PAPER:
        multiply_adds, parameters = measure(row.width, row.num_experts)
        difference = multiply_adds / row.multiply_adds - 1
        all_near &= abs(difference) <= TOLERANCE
        table.add_row(
            f"{row.width:.2f}",
            f"{row.num_experts}" if row.num_experts > 1 else "static",
            f"{row.mean_ap:.1f}",
            f"{row.multiply_adds:.0f} M",
            f"{multiply_adds:.1f} M",
            f"{difference:+.2%}",
            f"{parameters:.2f} M",
            end_section=row.num_experts > 1,
        )
    Console().print(table)
    if not all_near:
        sys.exit(f"multiply-adds differ from the paper's by more than {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
