from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from detection.errors import UserError
from detection.export.quantization import quantize_onnx

Export = Callable[..., Path]


def noise(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, 3, 64, 64), dtype=np.uint8)


def test_static_convolutions_compute_in_int8(export_model: Export, tmp_path: Path) -> None:
    source = export_model("ssd")
    path = tmp_path / "int8.onnx"
    count = quantize_onnx(source, [noise(4)], path)
    model = onnx.load(path)
    nodes = {node.output[0]: node for node in model.graph.node}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert count == len(convolutions) > 10
    for convolution in convolutions:
        for name in convolution.input[:2]:
            assert nodes[name].op_type == "DequantizeLinear"
    # What is mixed at run time is as it was.
    before = [node for node in onnx.load(source).graph.node if node.op_type == "Scan"]
    assert (
        [node.attribute for node in model.graph.node if node.op_type == "Scan"]
        == [node.attribute for node in before]
        != []
    )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["quantized"] == "int8" and metadata["input_size"] == "64"
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]

    for batch in (1, 3):
        scores = [
            onnxruntime.InferenceSession(file).run(["scores"], {"images": noise(batch)})[0]
            for file in (source, path)
        ]
        differences = np.abs(np.subtract(*scores))
        assert 0 < differences.mean() < 0.05 * scores[0].std() + 0.02


def test_mistakes(export_model: Export, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs images to calibrate with"):
        quantize_onnx(export_model("ssd"), [], tmp_path / "a.onnx")
    empty = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(empty), tmp_path / "empty.onnx")
    with pytest.raises(UserError, match="no static convolution to quantise"):
        quantize_onnx(tmp_path / "empty.onnx", [noise(1)], tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
