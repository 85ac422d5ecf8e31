"""Operators of an exported graph: what is folded before, and how they are written in ONNX.

Shapes: B images, E experts, C input channels, O output channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def fold_norms(program: torch.export.ExportedProgram) -> None:
    """Fold batch norm into the kernels before it, all experts alike, in place.

    With s = weight / sqrt(variance + epsilon), s (a_1 W_1 + ... + a_E W_E) is
    a_1 (s W_1) + ... + a_E (s W_E). A norm stays behind a layer that is called more than once, that
    has biases of its own, or that holds its kernels in another shape, as timm's CondConv does.
    """
    graph, state = program.graph, program.state_dict
    tensors = {**program.graph_signature.inputs_to_parameters,
               **program.graph_signature.inputs_to_buffers}  # fmt: skip
    operators = {torch.ops.condconv.exported.default: 3, torch.ops.aten.conv2d.default: 2}
    for layer in list(graph.nodes):
        bias_place = operators.get(layer.target)
        (norm,) = layer.users if len(layer.users) == 1 else (None,)
        if not bias_place or not norm or norm.target != torch.ops.aten.batch_norm.default:
            continue
        biases = layer.args[bias_place : bias_place + 1]
        inputs = [layer.args[1], *norm.args[1:5]]
        if biases not in ((), (None,)) or any(
            node is None or len(node.users) > 1 or node.name not in tensors for node in inputs
        ):
            continue
        names = [tensors[node.name] for node in inputs]
        kernels, scale, shift, mean, variance = (state[name] for name in names)
        scale = scale / (variance + norm.args[7]).sqrt()
        state[names[0]] = nn.Parameter((kernels * scale[:, None, None, None]).detach())
        state[names[2]] = nn.Parameter((shift - mean * scale).detach())
        layer.args = (*layer.args[:bias_place], inputs[2], *layer.args[bias_place + 1 :])
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)
    program.graph_module.recompile()


def translate_condconv2d(
    x: Any,
    weight: Any,
    routing_weights: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """`condconv::exported` in ONNX's operators: a matrix product, and a convolution an image.

    The convolution takes each image with its own kernel, so a runtime has all its fast kernels for
    it, and the batch stays open.
    """
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    num_experts, *kernel_shape = weight.shape
    # ONNX Runtime packs a constant matrix for long products. Of three axes it is read as it lies,
    # which one row of weights takes less time with.
    experts = op.Reshape(weight, [1, num_experts, -1])
    kernels = op.Reshape(op.MatMul(routing_weights, experts), [-1, *kernel_shape])
    images = op.Unsqueeze(x, [1])  # out here it copies nothing
    image, kernel = (
        ir.Value(name=f"{value.name}_{which}", type=ir.TensorType(x.dtype), shape=ir.Shape(shape))
        for value, which, shape in (
            (x, "image", [1, *x.shape[1:]]),
            (kernels, "kernel", kernel_shape),
        )
    )
    convolution = ir.node(
        "Conv",
        [image, kernel, *([] if bias is None else [bias])],
        {
            "strides": stride,
            "pads": [*padding, *padding],
            "dilations": dilation,
            "group": groups,
        },
    )
    body = ir.Graph([image, kernel], convolution.outputs, nodes=[convolution], name="convolve")
    return op.Squeeze(op.Scan(images, kernels, body=body, num_scan_inputs=2), [1])


def translate_suppress(
    boxes: Any,
    scores: Any,
    labels: Any,
    visible: Any,
    num_classes: int,
    score_threshold: float,
    iou_threshold: float,
    num_needed: int,
) -> Any:
    """`detection::suppress` in ONNX's operators."""
    from onnxscript import opset18

    op: Any = opset18  # whose types know nothing of Python's lists
    # A box has a score in its own class, and 0, which takes no part, in the others.
    own_class = op.OneHot(labels, [num_classes], [0.0, 1.0], axis=1)
    chosen = op.NonMaxSuppression(
        boxes,
        op.Mul(own_class, op.Unsqueeze(scores, [1])),
        [torch.iinfo(torch.int32).max],
        [iou_threshold],
        [max(score_threshold, 0.0)],
    )
    places = op.Gather(chosen, [0, 2], axis=1)  # of (image, class, box)
    nothing = op.ConstantOfShape(op.Shape(scores))
    survivors = op.ScatterND(nothing, places, op.GatherND(scores, places))
    return op.Greater(survivors, 0.0)
