from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from detection.errors import UserError
from detection.export.__main__ import export


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        ([], "checkpoint is not set: give checkpoint=FILE"),
        (["checkpoint=none.pt"], "none.pt: no such checkpoint file"),
        (["checkpoint=a.pt", "format=tflite"], "format=tflite: give one of onnx, openvino"),
        (["checkpoint=a.pt", "outputs=boxes"], "outputs=boxes: give one of detections, raw"),
        (["checkpoint=a.pt", "images=int8"], "images=int8: give one of uint8, float32"),
        (["checkpoint=a.pt", "weights=best"], "weights=best: give one of ema, model"),
        (["checkpoint=a.pt", "output=a.pt"], "output=a.pt: a file of format=onnx ends in .onnx"),
        (
            ["checkpoint=a.pt", "output=a.onnx", "format=torch_export"],
            "a file of format=torch_export ends in .pt2",
        ),
        (["checkpoint=a.pt", "output=none/a.onnx"], "there is no folder none"),
        (["checkpoint=a.pt", "quantize=true", "outputs=raw"], "is for format=onnx outputs=detect"),
        (["checkpoint=a.pt", "quantize=true", "num_samples=0"], "num_samples=0: give at least 1"),
    ],
)
def test_mistakes(compose_config: Callable[..., Any], overrides: list[str], answer: str) -> None:
    with pytest.raises(UserError, match=answer) as info:
        export(compose_config("export", overrides))
    assert "\n" not in str(info.value)


def test_specialised_and_quantised_with_what_it_costs(
    compose_config: Callable[..., Any], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained / "small.onnx"
    export(
        compose_config(
            "export",
            [f"checkpoint={trained / 'checkpoints' / 'last.pt'}", f"output={path}",
             "specialize=true", "quantize=true", "num_samples=3"],
        )
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "routing over 3 images" in printed and "backbone.blocks.5.router" in printed
    assert "47 static convolutions in INT8, calibrated on 3 images" in printed
    for name in ("checkpoint", "specialized", "quantized"):
        assert f"AP {name}" in printed
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["specialized"] == "true" and metadata["quantized"] == "int8"
    assert "Scan" not in {node.op_type for node in model.graph.node}
