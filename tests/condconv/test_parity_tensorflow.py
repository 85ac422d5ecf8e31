"""Our layers against outputs of the authors' TensorFlow layers.

The golden files lie in $CONDCONV_GOLDEN_DIR, or beside the checkout in shared/golden; every size
comes from their arrays.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from condconv import CondConv2d

GOLDEN_DIR = Path(
    os.environ.get("CONDCONV_GOLDEN_DIR") or Path(__file__).parents[3] / "shared" / "golden"
)


def list_cases() -> list:
    cases = [
        pytest.param(file, case, id=f"{file.stem}-{case['case']}")
        for file in sorted(GOLDEN_DIR.glob("condconv_layers*.npz"))
        for case in json.loads(str(np.load(file)["meta"]))
    ]
    absent = pytest.mark.skip(reason=f"no golden outputs (condconv_layers*.npz) in {GOLDEN_DIR}")
    return cases or [pytest.param(None, None, marks=absent)]


@pytest.mark.parametrize(("file", "case"), list_cases())
def test_condconv2d_equals_tensorflow(file: Path, case: dict) -> None:
    with np.load(file) as arrays:
        prefix = f"{case['case']}_"
        x, routing_weights, kernel, expected, bias = (
            torch.from_numpy(arrays[prefix + name]) if prefix + name in arrays.files else None
            for name in ("x", "r", "kernel", "y", "bias")
        )
    num_experts, kh, kw, channels, outputs = kernel.shape
    if case["kind"] == "dw":
        weight = kernel.permute(0, 3, 4, 1, 2).reshape(num_experts, channels * outputs, 1, kh, kw)
    else:
        weight = kernel.permute(0, 4, 3, 1, 2)
    layer = CondConv2d(
        channels,
        weight.shape[1],
        (kh, kw),
        stride=case["stride"],
        padding=case["padding"],
        dilation=case["dilation"],
        groups=channels if case["kind"] == "dw" else 1,
        bias=bias is not None,
        num_experts=num_experts,
    )
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    layer.load_state_dict(state)
    y = layer(x.permute(0, 3, 1, 2), routing_weights).permute(0, 2, 3, 1)
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
