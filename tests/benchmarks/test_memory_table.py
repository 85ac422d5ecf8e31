from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from benchmarks.memory_table import MODELS, make_table, measure_saved

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def test_the_page_has_the_scripts_table():
    table = PAGE[PAGE.index("| overrides |") :]
    assert re.findall(r"^\| `(.+?)`", table, flags=re.MULTILINE) == list(MODELS)
    small = [overrides for overrides in MODELS if overrides.endswith("width=0.5")]
    for line in make_table(small).splitlines():
        assert line in table.splitlines()


def test_saved_bytes_of_two_layers():
    """By hand: (B, 3, 8, 8), the input, and (B, 4, 8, 8), the output of ReLU, which the second
    convolution shares."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 7, 1))
    assert measure_saved(network, torch.zeros(2, 3, 8, 8)) == 2 * (3 + 4) * 64 * 4
