from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from benchmarks import classification_cost
from benchmarks.classification_cost import PAPER, PaperRow, main, measure, total

EFFICIENTNETS = [row for row in PAPER if "efficientnet" in row.name]


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row.name)
def test_costs_are_the_papers(row: PaperRow) -> None:
    multiply_adds, parameters = total(measure(row))
    assert multiply_adds == pytest.approx(row.multiply_adds, rel=0.02)
    if row.parameters:
        assert parameters == pytest.approx(row.parameters, rel=0.02)


@pytest.mark.parametrize("row", EFFICIENTNETS, ids=lambda row: row.name)
def test_elementwise_operations_are_the_difference(row: PaperRow) -> None:
    extra = 0

    def count(module: Any, _: Any, output: torch.Tensor) -> None:
        nonlocal extra
        kind = type(module).__name__
        swish = kind == "BatchNormAct2d" and isinstance(module.act, nn.SiLU)
        shortcut = getattr(module, "has_skip", False)
        extra += output.numel() * (swish + 2 * (kind == "SqueezeExcite") + shortcut)

    with torch.device("meta"), torch.no_grad():
        network = row.build().eval()
        for module in network.modules():
            module.register_forward_hook(count)
        network(torch.zeros(1, 3, 224, 224))
    multiply_adds, _ = total(measure(row))
    assert round(multiply_adds + extra / 2e6) == row.multiply_adds


def test_resnet_costs_its_mixing_and_routing_more() -> None:
    rows = [row for row in PAPER if row.name in ("resnet50", "resnet50_8e")]
    costs = {row.name: total(measure(row)) for row in rows}
    with torch.device("meta"):
        network = resnet50()
    mixed = [network.fc.weight, network.fc.bias]
    routing = 2048 * 8
    for block in network.layer4:
        mixed += [block.conv1.weight, block.conv2.weight, block.conv3.weight]
        routing += block.conv1.in_channels * 8
    extra = 8 * sum(parameter.numel() for parameter in mixed) + routing
    assert costs["resnet50_8e"][0] - costs["resnet50"][0] == pytest.approx(extra / 1e6)


def test_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = EFFICIENTNETS[0]
    monkeypatch.setattr(classification_cost, "PAPER", (row,))
    monkeypatch.setattr(sys, "argv", ["", "--modules", row.name])
    main()
    printed = capsys.readouterr().out
    assert "385.8" in printed and "conv_stem" in printed

    monkeypatch.setattr(classification_cost, "PAPER", (row._replace(parameters=5.5),))
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(SystemExit, match=r"further than 2% .* tf_efficientnet_b0"):
        main()
