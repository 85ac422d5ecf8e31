"""CondConv layers of an exported graph in integers.

With routing weights a_e = b_e / 127 and experts W_e = s Q_e, b and Q integers and s a number for
each output channel, the mixed kernel has the codes (b_1 Q_1 + ... + b_E Q_E) / (127 t), rounded,
and the scale s t. t is one number, such that no kernel seen is clipped.

A layer of one group is a product of its map's rows (P, kh kw C) and the mixed kernel (kh kw C, O):
in a convolution, ONNX Runtime would turn over a kernel that comes at run time, code by code. Both
have codes of 0 to 127: without VNNI, pairs of products are added in 16 bits, and 2 x 127 x 127
fits into those, whatever the image. A layer of groups is a convolution of 8 bits, which is added
in 32. Maps go from layer to layer as codes, the channels last.

Shapes: B images, E experts, C input channels, O output channels, H, W a map, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from detection.export.conditional import Layer, Ranges, find_layers
from detection.export.integer_bodies import Codes, Constants, convolve, multiply
from detection.export.integer_kernels import find_positions, quantize_experts, stack_blocks

FLOAT = 1  # ONNX's number of the type


def quantize_layers(model: Any, ranges: Mapping[str, Ranges]) -> int:
    """Have CondConv layers mix and convolve in integers, in place; gives how many.

    Args:
        model: of `onnx_ir`, float or with static convolutions quantised.
        ranges: of `calibrate`.
    """
    from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

    layers = find_layers(model.graph)
    routings: dict[Any, list[np.ndarray]] = {}
    for layer in layers:  # calls may share experts
        routings.setdefault(layer.experts, []).append(ranges[layer.name].routing_weights)
    writer = _Writer(model.graph, {layer.x for layer in layers if layer.groups == 1})
    for layer in layers:
        writer.write(layer, ranges[layer.name], np.concatenate(routings[layer.experts]))
    for layer in layers:  # a body that is gone would still count as a user of its bias
        layer.convolution.resize_inputs(2)
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)  # a body may not have a name of the graph
    return len(layers)


class _Writer:
    """Writes layers into a graph; knows which of its maps there are as codes.

    Args:
        narrow: the maps that need codes of 7 bits.
    """

    def __init__(self, graph: Any, narrow: set[Any]) -> None:
        from onnx_ir.tape import Tape

        self.graph = graph
        self.constant = Constants(graph)
        self.narrow = narrow
        self.maps: dict[Any, Codes] = {}  # rows (B, H W, C), for float maps (B, C, H, W)
        self.new_tape = Tape

    def write(self, layer: Layer, ranges: Ranges, routing_weights: np.ndarray) -> None:
        """Put integers in a layer's place; `routing_weights` (N, E) are of all calls."""
        tape = self.new_tape()
        x = self.maps.get(layer.x) or self.encode(layer, ranges.x)
        _, shift = layer.affine()
        of_x = x.scale.const_value.numpy()
        # A bias has codes of 32 bits, in the unit of the products. Where it would need more, the
        # unit is raised: products are nothing beside such a bias, and a hundred of the largest stay
        # below 0.4 % of it.
        kernels = self.mix_kernels(tape, layer, routing_weights, np.abs(shift) / of_x / 2**30)
        unit = of_x * kernels.scale.const_value.numpy()
        bias = Codes(
            self.constant(f"{layer.name}_bias", np.rint(shift / unit).astype(np.int32)),
            self.constant(f"{layer.name}_bias_scale", unit),
            None,
        )
        y = self.quantization_of(layer.y, ranges.y)
        write_body = multiply if layer.groups == 1 else convolve
        body = write_body(self.constant, layer, x, kernels, bias, y)
        rows = tape.op("Scan", [x.value, kernels.value], {"body": body, "num_scan_inputs": 2})
        _, size = find_positions(layer)
        y = self.replace_by_codes(
            tape, layer.y, y._replace(value=rows), size, layer.kernel_shape[0]
        )
        self.graph.insert_before(layer.scan, tape.nodes)
        self.maps[layer.y] = y

    def quantization_of(self, value: Any, ends: tuple[float, float]) -> Codes:
        """Scale and zero of a float map's codes: the static quantiser's, or 7 bits."""
        if value not in self.narrow:
            for node, _ in value.uses():
                if node.op_type == "QuantizeLinear":
                    return Codes(None, *node.inputs[1:])
        low, high = min(ends[0], 0.0), max(ends[1], 0.0)
        scale = np.float32((high - low) / (127 if value in self.narrow else 255) or 1)
        return Codes(
            None,
            self.constant(f"{value.name}_step", scale),
            self.constant(f"{value.name}_offset", np.uint8(np.rint(-low / scale))),
        )

    def encode(self, layer: Layer, ends: tuple[float, float]) -> Codes:
        """A layer's float map as codes."""
        tape = self.new_tape()
        value, (height, width) = layer.x, layer.size
        channels = layer.kernel_shape[1] * layer.groups
        x = self.quantization_of(value, ends)
        codes = tape.op("QuantizeLinear", [value, x.scale, x.zero])
        codes = tape.op("Transpose", [codes], {"perm": [0, 2, 3, 1]})
        rows = tape.op("Reshape", [codes, self.constant.shape(-1, height * width, channels)])
        self.maps[value] = x = x._replace(value=self.clip_to_7_bits(tape, value, rows))
        self.replace_means(tape, value, x, height * width)
        if producer := value.producer():
            self.graph.insert_after(producer, tape.nodes)
        else:
            self.graph.insert_before(self.graph[0], tape.nodes)
        return x

    def clip_to_7_bits(self, tape: Any, value: Any, codes: Any) -> Any:
        if value not in self.narrow:
            return codes
        return tape.op("Clip", [codes, None, self.constant("max_code", np.uint8(127))])

    def replace_by_codes(
        self, tape: Any, value: Any, y: Codes, size: tuple[int, int], channels: int
    ) -> Codes:
        """Replace a float map by its codes; what stays in float reads them through a
        DequantizeLinear."""
        y = y._replace(value=self.clip_to_7_bits(tape, value, y.value))
        self.replace_means(tape, value, y, size[0] * size[1])
        maps = tape.op("Reshape", [y.value, self.constant.shape(-1, *size, channels)])
        maps = tape.op("Transpose", [maps], {"perm": [0, 3, 1, 2]})
        for node, _ in list(value.uses()):
            if node.op_type == "QuantizeLinear" and node.inputs[1] is y.scale:
                node.outputs[0].replace_all_uses_with(maps)
        floats = tape.op("DequantizeLinear", [maps, y.scale, y.zero])
        floats.shape, floats.dtype = value.shape, value.dtype
        value.replace_all_uses_with(floats, replace_graph_outputs=True)
        return y

    def replace_means(self, tape: Any, value: Any, codes: Codes, number: int) -> None:
        """Routers' means of a float map over its positions: products of codes with ones."""
        users = [node for node, _ in value.uses()]
        for node in [node for node in users if node.op_type == "QuantizeLinear"]:
            for decode, _ in node.outputs[0].uses():
                users += [user for user, _ in decode.outputs[0].uses()]
        for node in users:
            if node.op_type != "ReduceMean" or node.attributes["keepdims"].as_int():
                continue
            axes = node.inputs[1].const_value.numpy() % 4
            if sorted(axes.tolist()) != [2, 3]:
                continue
            ones = self.constant(f"ones_{number}", np.ones((1, number), np.uint8))
            none = self.constant("zero", np.uint8(0))
            sums = tape.op("MatMulInteger", [ones, codes.value, none, codes.zero])
            scale = self.constant(f"{value.name}_mean", codes.scale.const_value.numpy() / number)
            sums = tape.op("Squeeze", [sums, self.constant("second_axis", np.array([1]))])
            mean = tape.op("Mul", [tape.op("Cast", [sums], {"to": FLOAT}), scale])
            node.outputs[0].replace_all_uses_with(mean)

    def mix_kernels(
        self, tape: Any, layer: Layer, routing_weights: np.ndarray, least: np.ndarray
    ) -> Codes:
        """Kernels of all images as uint8, scaled as batch norm wants, by `least` (O,) or more."""
        name, product = layer.experts.name, layer.groups == 1
        weight = layer.experts.const_value.numpy().reshape(-1, *layer.kernel_shape)
        zero = 64 if product else 128
        codes, scale, step = quantize_experts(weight, routing_weights, zero - 1)
        shape = layer.kernel_shape
        if product:
            codes = codes.transpose(0, 3, 4, 2, 1)
            shape = (weight[0, 0].size, len(scale))
        one, none = self.constant("one", np.float32(1)), self.constant("zero", np.uint8(0))
        routing_step = self.constant("routing_step", np.float32(1 / 127))
        blocks = stack_blocks(codes.reshape(len(codes), -1))
        rows = self.spread_diagonally(tape, layer.routing_weights, len(blocks) // len(codes))
        kernels = tape.op(
            "QLinearMatMul",
            [
                tape.op("QuantizeLinear", [rows, routing_step, none]),
                routing_step, none,
                self.constant(f"{name}_int8", blocks),
                one, self.constant("no_offset", np.int8(0)),
                self.constant(f"{name}_step", np.float32(step)),
                self.constant(f"offset_{zero}", np.uint8(zero)),
            ],
        )  # fmt: skip
        scale = scale * step * layer.affine()[0]
        scale = np.copysign(np.maximum(np.abs(scale), np.maximum(least, 1e-30)), scale)
        zeros = np.full(len(scale), zero, np.int8 if product else np.uint8)
        return Codes(
            tape.op("Reshape", [kernels, self.constant.shape(-1, *shape)]),
            self.constant(f"{layer.name}_scale", scale.astype(np.float32)),
            self.constant(f"offsets_{zero}_{len(scale)}", zeros),
        )

    def spread_diagonally(self, tape: Any, routing_weights: Any, num_blocks: int) -> Any:
        """Weights (B, E) -> (B n, n E), those of an image n times along a diagonal."""
        diagonal = self.constant(
            f"diagonal_{num_blocks}", np.eye(num_blocks, dtype=np.float32)[..., None]
        )
        axes = self.constant("inner_axes", np.array([1, 2]))
        rows = tape.op("Mul", [tape.op("Unsqueeze", [routing_weights, axes]), diagonal])
        _, num_experts = routing_weights.shape
        return tape.op("Reshape", [rows, self.constant.shape(-1, num_blocks * num_experts)])
