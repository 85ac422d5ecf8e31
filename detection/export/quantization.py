"""An exported file with integer convolutions."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.errors import UserError
from detection.export.files import written_whole


def quantize_onnx(
    source: str | Path, images: Sequence[np.ndarray], path: str | Path, *, experts: bool = True
) -> int:
    """Write an ONNX file whose static convolutions compute in INT8, its experts stored in INT8.

    ONNX Runtime's static quantiser: weights of 7 bits by output channel (without VNNI, sums of
    products of 8 bits overflow), activations of 8 bits by tensor, from the least and largest
    value seen. CondConv layers mix integers, see `quantize_experts`. Routers, the convolutions
    with mixed kernels, decoding and suppression stay in float.

    Args:
        source: as `export_onnx` writes it.
        images: batches to calibrate with, as the file takes them.
        path: where to write; its metadata gains `quantized`.
        experts: else CondConv layers stay as they are.

    Returns:
        How many convolutions compute in INT8.

    Raises:
        UserError: where there are no images, no such convolution, or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnx_ir
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
    except ImportError as error:
        raise UserError(f"quantize=true needs {error.name}: pip install -e '.[export]'") from error
    if not len(images):
        raise UserError("quantize=true needs images to calibrate with: the data has none")
    model = onnx.load(source)
    num_convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    if not num_convolutions:
        raise UserError("quantize=true: the network has no static convolution")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx_ir.load(result)
        if experts:
            quantize_experts(quantized)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        quantized.metadata_props.clear()
        quantized.metadata_props.update(properties, quantized="int8")
        with written_whole(path) as partial:
            onnx_ir.save(quantized, partial)
    return num_convolutions


def quantize_experts(model: Any) -> None:
    """Mix the kernels of CondConv layers from experts in INT8, in place.

    With routing weights a_e = t b_e and experts W_e = s Q_e, b and Q integers, a layer becomes
    s t ((b_1 Q_1 + ... + b_E Q_E) * x + bias / (s t)): t is 1 / 127, as routing weights lie in
    (0, 1), and s is one number for each output channel. The sum of two products fits into 16 bits,
    as it must without VNNI. Kernels of groups stay in float: they are few.

    Args:
        model: of `onnx_ir`, in it layers as `translate_condconv2d` writes them.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnx_ir.tape import Tape

    graph = model.graph

    def constant(name: str, array: Any) -> Any:
        if name not in graph.initializers:  # layers may share experts
            graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array)))
        return graph.initializers[name]

    routing_step = [constant("routing_step", np.float32(1 / 127)), constant("zero", np.uint8(0))]
    for scan in [node for node in graph if node.op_type == "Scan"]:
        convolution = scan.attributes["body"].as_graph().node(0)
        if convolution.attributes["group"].as_int() > 1:
            continue
        mixing = scan.inputs[1].producer().inputs[0].producer()
        routing_weights, experts = mixing.inputs
        while node := experts.producer():  # what gives them another shape
            experts = node.inputs[0]
        kernel_shape = convolution.inputs[1].shape
        weight = experts.const_value.numpy().reshape(-1, *kernel_shape)  # (E, O, C, kh, kw)
        largest = np.abs(weight).max((0, 2, 3, 4))
        step = np.where(largest > 0, largest, 1) / np.float32(127)
        codes = np.rint(weight / step[:, None, None, None]).astype(np.int8)
        scale = step / np.float32(127)

        mix, rescale = Tape(), Tape()
        integers = mix.op("QuantizeLinear", [routing_weights, *routing_step])
        matrix = constant(f"{experts.name}_int8", codes.reshape(len(codes), -1))
        kernels = mix.op("Cast", [mix.op("MatMulInteger", [integers, matrix])], {"to": 1})
        graph.insert_before(mixing, mix.nodes)
        mixing.outputs[0].replace_all_uses_with(kernels)

        if len(convolution.inputs) > 2:
            bias = convolution.inputs[2]
            unscaled = constant(f"{bias.name}_unscaled", bias.const_value.numpy() / scale)
            convolution.replace_input_with(2, unscaled)
        ((squeeze, _),) = scan.outputs[0].uses()
        output = squeeze.outputs[0]
        scaled = rescale.op(
            "Mul", [output, constant(f"{experts.name}_scale", scale[:, None, None])]
        )
        output.replace_all_uses_with(scaled)
        rescale.nodes[0].replace_input_with(0, output)
        graph.insert_after(squeeze, rescale.nodes)
    RemoveUnusedNodesPass()(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
