from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from detection.errors import UserError
from detection.export.quantization import quantize_onnx

Export = Callable[..., Path]


def noise(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, 3, 64, 64), dtype=np.uint8)


def test_convolutions_compute_in_int8(export_model: Export, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    count = quantize_onnx(export_model("ssd"), [noise(4)], path)
    model = onnx.load(path)
    nodes = {node.output[0]: node for node in model.graph.node}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for convolution in convolutions:
        for name in convolution.input[:2]:
            assert nodes[name].op_type == "DequantizeLinear"
    scans = [node for node in model.graph.node if node.op_type == "Scan"]
    assert len(convolutions) > 10 and len(scans) > 10
    assert count == len(convolutions) + len(scans)
    for scan in scans:
        assert nodes[nodes[scan.input[1]].input[0]].op_type == "QLinearMatMul"
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for product in (node for node in model.graph.node if node.op_type == "QLinearMatMul"):
        experts = tensors[product.input[3]]
        assert experts.dtype == np.int8 and len(experts) == 64 and 63 < np.abs(experts).max() <= 127
    assert max(t.size for t in tensors.values() if t.dtype == np.float32) < 5000
    # Maps go on as codes: none of a layer's is converted for the next one, nor for its router.
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert sum(node.op_type == "ReduceMean" for node in model.graph.node) == 0
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["quantized"] == "int8" and metadata["input_size"] == "64"
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]

    # A file of standard operators has them between numbers; ONNX Runtime makes integers of both.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options)
    optimized = onnx.load(tmp_path / "optimized.onnx").graph.node
    bodies = [
        {inner.op_type for inner in attribute.g.node}
        for node in optimized
        for attribute in node.attribute
        if attribute.name == "body"
    ]
    assert len(bodies) == len(scans)
    for operators in (*bodies, {node.op_type for node in optimized}):
        assert operators & {"QLinearConv", "QGemm"} and not operators & {"Conv", "Gemm"}


def test_experts_stay_in_float(export_model: Export, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    count = quantize_onnx(export_model("ssd"), [noise(4)], path, experts=False)
    model = onnx.load(path)
    assert count == sum(node.op_type == "Conv" for node in model.graph.node)
    scans = [node for node in model.graph.node if node.op_type == "Scan"]
    assert scans and {scan.attribute[0].g.node[0].op_type for scan in scans} == {"Conv"}


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
    with pytest.raises(UserError, match="the network has no convolution"):
        quantize_onnx(tmp_path / "empty.onnx", [noise(1)], tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_a_fault_of_calibration_is_told_as_it_is(
    export_model: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a file that cannot be written."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    with pytest.raises(RuntimeError, match="broken"):
        quantize_onnx(export_model("ssd"), [noise(1)], tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
