"""The CondConv layers of an exported graph: where they are, and what they meet.

Shapes: B images, N images to calibrate with, E experts, C input channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Layer:
    """A call of a CondConv layer, as `translate_condconv2d` writes it; values are of `onnx_ir`.

    Args:
        scan: over the images.
        convolution: in its body; takes a kernel (O, C / groups, kh, kw).
        x: the map (B, C, H, W) that comes in, before padding.
        size: H, W.
        pads: of that map: top, left, bottom, right.
        routing_weights: (B, E).
        experts: E kernels in some shape.
        norm: batch norm behind the layer, where it could not be folded.
        y: the map that goes out, behind batch norm and a ReLU.
    """

    scan: Any
    convolution: Any
    x: Any
    size: tuple[int, int]
    pads: tuple[int, ...]
    routing_weights: Any
    experts: Any
    norm: Any | None
    y: Any

    @property
    def name(self) -> str:
        """Not of `y`, which a quantiser may give another name."""
        return self.scan.outputs[0].name

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return tuple(self.convolution.inputs[1].shape)

    @property
    def groups(self) -> int:
        return self.convolution.attributes["group"].as_int()

    def per_axis(self, attribute: str) -> list[int]:
        """The convolution's strides or dilations."""
        return list(self.convolution.attributes[attribute].as_ints())

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """What is done to the output of the kernels: y = factor * output + shift, both (O,)."""
        inputs = self.convolution.inputs
        ones = np.ones(self.kernel_shape[0], np.float32)
        shift = inputs[2].const_value.numpy() if len(inputs) > 2 else 0 * ones
        if self.norm is None:
            return ones, shift
        scale, offset, mean, variance = (v.const_value.numpy() for v in self.norm.inputs[1:])
        factor = scale / np.sqrt(variance + self.norm.attributes["epsilon"].as_float())
        return factor, (shift - mean) * factor + offset


class Ranges(NamedTuple):
    """What a layer met: least and largest value of its maps, and routing weights (N, E)."""

    x: tuple[float, float]
    y: tuple[float, float]
    routing_weights: np.ndarray


def find_layers(graph: Any) -> list[Layer]:
    """The calls of CondConv layers in a graph of `onnx_ir`, in their order."""
    layers = []
    for scan in [node for node in graph if node.op_type == "Scan"]:
        convolution = scan.attributes["body"].as_graph().node(0)
        height, width = convolution.inputs[0].shape[2:]
        pads = np.array(convolution.attributes["pads"].as_ints())
        x = scan.inputs[0].producer().inputs[0]
        if (pad := x.producer()) and pad.op_type == "Pad":
            own = pad.inputs[1].const_value.numpy().reshape(2, -1)[:, -2:].flatten()
            height, width = height - own[0] - own[2], width - own[1] - own[3]
            pads, x = pads + own, pad.inputs[0]
        routing_weights, experts = scan.inputs[1].producer().inputs[0].producer().inputs
        while node := experts.producer():  # what gives them another shape
            experts = node.inputs[0]
        ((squeeze, _),) = scan.outputs[0].uses()
        y, norm = squeeze.outputs[0], None
        if (user := _only_user(y)) and user.op_type == "BatchNormalization":
            y, norm = user.outputs[0], user
        if (user := _only_user(y)) and _is_relu(user):
            y = user.outputs[0]
        if (node := x.producer()) and node.op_type == "DequantizeLinear":
            x = node.inputs[0].producer().inputs[0]  # a static convolution takes its codes too
        size, pads = (int(height), int(width)), tuple(pads.tolist())
        layers.append(Layer(scan, convolution, x, size, pads, routing_weights, experts, norm, y))
    return layers


def _only_user(value: Any) -> Any | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _is_relu(node: Any) -> bool:
    """Whether all it does is done by codes that stop at the ends of what was seen behind it."""
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    low = node.inputs[1]
    return low is not None and low.const_value is not None and not low.const_value.numpy().any()


def calibrate(model: Any, images: Sequence[np.ndarray]) -> dict[str, Ranges]:
    """What the layers of a float model of `onnx_ir` meet on images, by their names.

    Args:
        images: batches, as the model takes them.
    """
    import onnx_ir as ir
    import onnxruntime

    layers = find_layers(model.graph)
    if not layers:
        return {}
    maps = list(dict.fromkeys(value for layer in layers for value in (layer.x, layer.y)))
    routings = list(dict.fromkeys(layer.routing_weights for layer in layers))
    kept = list(model.graph.outputs)
    model.graph.outputs[:] = [*maps, *routings]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no advice on what only the other outputs need
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    model.graph.outputs[:] = kept
    ends: list[list[tuple[float, float]]] = []
    weights: list[list[np.ndarray]] = []
    for batch in images:
        found = [np.asarray(array) for array in session.run(None, {"images": batch})]
        ends.append([(float(a.min()), float(a.max())) for a in found[: len(maps)]])
        weights.append(found[len(maps) :])
    extremes = {
        value: (min(low for low, _ in pairs), max(high for _, high in pairs))
        for value, pairs in zip(maps, zip(*ends, strict=True), strict=True)
    }
    seen = {value: np.concatenate(rows)
            for value, rows in zip(routings, zip(*weights, strict=True), strict=True)}  # fmt: skip
    return {
        layer.name: Ranges(extremes[layer.x], extremes[layer.y], seen[layer.routing_weights])
        for layer in layers
    }
