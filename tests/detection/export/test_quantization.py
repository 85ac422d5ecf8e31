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
    scans, before = (
        [
            sorted(node.attribute, key=lambda attribute: attribute.name)
            for node in file.graph.node
            if node.op_type == "Scan"
        ]
        for file in (model, onnx.load(source))
    )
    assert scans == before != []
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["quantized"] == "int8" and metadata["input_size"] == "64"
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]


def test_int8_computes_nearly_the_same(tmp_path: Path) -> None:
    # Two layers, as the rounding of each grows in the next where weights are random.
    generator = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(generator.normal(size=size).astype(np.float32), name)
        for name, size in (("first", (8, 3, 3, 3)), ("second", (4, 8, 1, 1)))
    ]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["images", "first"], ["a"]),
            onnx.helper.make_node("Relu", ["a"], ["b"]),
            onnx.helper.make_node("Conv", ["b", "second"], ["scores"]),
        ],
        "network",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["B", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["B", 4, 6, 6])],
        weights,
    )
    source, path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), source)
    samples = [generator.normal(size=(4, 3, 8, 8)).astype(np.float32) for _ in range(8)]
    assert quantize_onnx(source, samples, path) == 2
    expected, actual = (
        onnxruntime.InferenceSession(file).run(["scores"], {"images": samples[0]})[0]
        for file in (source, path)
    )
    assert 0 < np.abs(actual - expected).std() < 0.03 * expected.std()


def test_mistakes(export_model: Export, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs images to calibrate with"):
        quantize_onnx(export_model("ssd"), [], tmp_path / "a.onnx")
    empty = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(empty), tmp_path / "empty.onnx")
    with pytest.raises(UserError, match="no static convolution to quantise"):
        quantize_onnx(tmp_path / "empty.onnx", [noise(1)], tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
