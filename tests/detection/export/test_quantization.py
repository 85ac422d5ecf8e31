from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from condconv import CondConv2d, RoutedCondConv2d
from detection.errors import UserError
from detection.export.operators import fold_norms, translate_condconv2d
from detection.export.quantization import quantize_experts, quantize_onnx

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
    # Routers, mixed depthwise kernels and all convolutions with mixed kernels compute in float.
    scans = [node for node in model.graph.node if node.op_type == "Scan"]
    mixing = [nodes[nodes[scan.input[1]].input[0]] for scan in scans]
    assert {node.op_type for node in mixing} == {"MatMul", "Cast"}
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for product in (node for node in model.graph.node if node.op_type == "MatMulInteger"):
        experts = tensors[product.input[1]]
        assert experts.dtype == np.int8 and len(experts) == 2 and np.abs(experts).max() == 127
    assert max(t.size for t in tensors.values() if t.dtype == np.float32) < 5000
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["quantized"] == "int8" and metadata["input_size"] == "64"
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]


class Conditional(nn.Module):
    """Layers of all kinds, with batch norm and without, and outputs on scales far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.same = RoutedCondConv2d(4, 16, 3, 2, "same", bias=False, num_experts=3)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = RoutedCondConv2d(16, 16, 3, 1, 1, groups=16, bias=False, num_experts=3)
        self.pointwise = CondConv2d(16, 8, 1, bias=False, num_experts=3)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.normal_(self.norm.bias)
        with torch.no_grad():
            self.norm.weight[:3] = torch.tensor([0.0, 0.01, 100.0])
            self.depthwise.weight[:, 2] /= 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.same(x)).relu())
        weights = self.depthwise.router(x)
        return self.pointwise(x, weights) + self.pointwise(x * 2, weights.flip(1))


def test_experts_in_int8_compute_nearly_the_same() -> None:
    torch.manual_seed(0)
    layers = Conditional().eval()
    dims = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(layers, (torch.zeros(2, 4, 12, 11),), dynamic_shapes=dims)
    fold_norms(program)
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=({0: "batch"},),
        custom_translation_table={torch.ops.condconv.exported.default: translate_condconv2d},
    )  # fmt: skip
    assert exported is not None
    quantize_experts(exported.model)
    model = onnx_ir.to_proto(exported.model)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MatMulInteger") == 3 and operators.count("MatMul") == 1
    types = [tensor.data_type for tensor in model.graph.initializer]
    assert types.count(onnx.TensorProto.INT8) == 2  # of which one is shared
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch in (1, 3, 8):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, 4, 12, 11, generator=generator)
        with torch.no_grad():
            expected = layers(x).numpy()
        (actual,) = session.run(None, {"x": x.numpy()})
        error = np.abs(actual - expected).std((0, 2, 3)) / expected.std((0, 2, 3))
        # Two layers in a row, each with routing weights rounded to 1 / 127.
        assert error.min() > 0 and error.max() < 0.02


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
    with pytest.raises(UserError, match="the network has no static convolution"):
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
