"""What an integer CondConv layer does with one image: the bodies of its `Scan`.

Shapes: C input channels, O output channels, H, W a map, P positions of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from detection.export.conditional import Layer
from detection.export.integer_kernels import find_positions

INT8 = 3  # ONNX's number of the type


class Codes(NamedTuple):
    """Integers in a graph, their scale, a number or (O,), and the code of zero."""

    value: Any
    scale: Any
    zero: Any


class Constants:
    """The initializers of a graph, each written once."""

    def __init__(self, graph: Any) -> None:
        self.initializers = graph.initializers
        self.register = graph.register_initializer

    def __call__(self, name: str, array: Any) -> Any:
        import onnx_ir as ir

        if name not in self.initializers:
            self.register(ir.Value(name=name, const_value=ir.tensor(np.asarray(array))))
        return self.initializers[name]

    def shape(self, *sizes: int) -> Any:
        return self("_".join(["shape", *map(str, sizes)]), np.array(sizes))


def multiply(
    constant: Constants, layer: Layer, x: Codes, kernels: Codes, bias: Codes, y: Codes
) -> Any:
    """Rows (H W, C) times a kernel (kh kw C, O): rows (P, O)."""
    from onnx_ir.tape import Tape

    body = Tape()
    out, channels, *size = layer.kernel_shape
    number, depth = layer.size[0] * layer.size[1], size[0] * size[1] * channels
    rows = image = _part(f"{layer.name}_image", (number, channels))
    kernel = _part(f"{layer.name}_kernel", (depth, out))
    places, _ = find_positions(layer)
    if not np.array_equal(places, np.arange(number)):
        if places.max() == number:
            a_row = constant("a_row", np.array([0, 0, 1, 0]))
            rows = body.op("Pad", [rows, a_row, x.zero])
        rows = body.op("Gather", [rows, constant(f"{layer.name}_places", places)])
        rows = body.op("Reshape", [rows, constant.shape(-1, depth)])
    codes = body.op("Clip", [kernel, None, constant("max_code", np.uint8(127))])
    codes = body.op("Cast", [codes], {"to": INT8})  # with which products take less time
    inputs = x._replace(value=rows), kernels._replace(value=codes), bias
    rows = _between_codes(body, "Gemm", *inputs, y, channel_axis=1)
    return _graph(body, [image, kernel], rows)


def convolve(
    constant: Constants, layer: Layer, x: Codes, kernels: Codes, bias: Codes, y: Codes
) -> Any:
    """Rows (H W, C) convolved with a kernel (O, C / groups, kh, kw): rows (P, O)."""
    from onnx_ir.tape import Tape

    body = Tape()
    channels = layer.kernel_shape[1] * layer.groups
    image = _part(f"{layer.name}_image", (layer.size[0] * layer.size[1], channels))
    kernel = _part(f"{layer.name}_kernel", layer.kernel_shape)
    maps = body.op("Reshape", [image, constant.shape(1, *layer.size, channels)])
    # ONNX Runtime has the channels last in a QLinearConv, and cancels these with its own.
    maps = body.op("Transpose", [maps], {"perm": [0, 3, 1, 2]})
    inputs = x._replace(value=maps), kernels._replace(value=kernel), bias
    attributes = {
        "strides": layer.per_axis("strides"),
        "dilations": layer.per_axis("dilations"),
        "pads": layer.pads,
        "group": layer.groups,
    }
    maps = _between_codes(body, "Conv", *inputs, y, attributes, channel_axis=0)
    maps = body.op("Transpose", [maps], {"perm": [0, 2, 3, 1]})
    rows = body.op("Reshape", [maps, constant.shape(-1, layer.kernel_shape[0])])
    return _graph(body, [image, kernel], rows)


def _between_codes(
    body: Any,
    operator: str,
    x: Codes,
    kernel: Codes,
    bias: Codes,
    y: Codes,
    attributes: Mapping[str, Any] | None = None,
    *,
    channel_axis: int,
) -> Any:
    """An operator on numbers, between codes: ONNX Runtime computes it in integers.

    Args:
        channel_axis: of the kernel's output channels.
    """
    numbers = [
        body.op("DequantizeLinear", list(x)),
        body.op("DequantizeLinear", list(kernel), {"axis": channel_axis}),
        body.op("DequantizeLinear", [bias.value, bias.scale], {"axis": 0}),
    ]
    return body.op("QuantizeLinear", [body.op(operator, numbers, attributes), y.scale, y.zero])


def _part(name: str, shape: Sequence[int]) -> Any:
    """What a body takes: one image's."""
    import onnx_ir as ir

    return ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(shape))


def _graph(tape: Any, inputs: Sequence[Any], output: Any) -> Any:
    import onnx_ir as ir

    output.type, output.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape([None, None])
    return ir.Graph(inputs, [output], nodes=tape.nodes, name="convolve")
