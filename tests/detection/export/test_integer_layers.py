from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from condconv import CondConv2d, RoutedCondConv2d, Router
from detection.export.conditional import calibrate, find_layers
from detection.export.integer_kernels import quantize_experts, stack_blocks
from detection.export.integer_layers import quantize_layers
from detection.export.operators import fold_norms, translate_condconv2d


def batch(size: int) -> Tensor:
    return torch.randn(size, 8, 12, 11, generator=torch.Generator().manual_seed(size))


def export(network: nn.Module, *, fold: bool = True) -> Any:
    dims = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(network.eval(), (batch(2),), dynamic_shapes=dims)
    if fold:
        fold_norms(program)
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"],
        dynamic_shapes=({0: "batch"},),
        custom_translation_table={torch.ops.condconv.exported.default: translate_condconv2d},
    )  # fmt: skip
    assert exported is not None
    return exported.model


def quantize(network: nn.Module, images: list[Tensor], *, fold: bool = True) -> Any:
    model = export(network, fold=fold)
    ranges = calibrate(model, [image.numpy() for image in images])
    assert quantize_layers(model, ranges) == len(ranges) > 0
    return model


def run(model: Any, x: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return [np.asarray(found) for found in session.run(None, {"images": x.numpy()})]


@pytest.mark.parametrize(
    "layer",
    [
        RoutedCondConv2d(8, 16, 1, num_experts=3, bias=False),
        RoutedCondConv2d(8, 16, 1, 2, num_experts=3, bias=False),
        RoutedCondConv2d(8, 16, 3, 2, "same", bias=False, num_experts=3),
        RoutedCondConv2d(8, 16, (3, 2), (1, 2), (2, 0), (2, 1), bias=False, num_experts=2),
        RoutedCondConv2d(8, 8, 3, 1, 1, groups=8, bias=False, num_experts=3),
        RoutedCondConv2d(8, 16, 3, 2, "same", groups=4, bias=False, num_experts=3),
    ],
    ids=["pointwise", "strided", "same", "dilated", "depthwise", "groups"],
)
def test_a_layer_errs_as_its_steps_say(layer: RoutedCondConv2d) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():  # were drawn before the seed was set
            parameter.normal_()
        layer.weight[:, 1] *= 0.1  # channels have scales of their own
        layer.weight[:, 2] *= 0
    x = batch(8)
    model = quantize(layer, [x])
    with torch.no_grad():
        expected, weights = layer(x).numpy(), layer.router(x).numpy()
    error = run(model, x)[0] - expected
    # Rounding to steps d errs by d^2 / 12: of the map; of the codes of the input, by the kernel; of
    # the kernel, its experts, and their weights, by the input.
    levels = 127 if layer.groups == 1 else 255
    experts = layer.weight.detach().flatten(2).numpy()
    kernels = np.einsum("be,eoi->boi", weights, experts)
    of_y = (expected.max() - expected.min()) / 255
    of_x = (x.max() - x.min()).item() / levels
    of_kernel = np.abs(kernels).max((0, 2)) * 2 / (levels - 1)
    of_expert = np.abs(experts).max((0, 2)) / 127
    by_input = (kernels**2).mean((0, 2)) * of_x**2
    by_weights = of_kernel**2 + of_expert**2 * (weights**2).sum(1).mean()
    by_weights += (experts**2).sum(0).mean(1) / 127**2
    by_kernel = (x**2).mean().item() * by_weights
    variance = (of_y**2 + kernels.shape[2] * (by_input + by_kernel)) / 12
    # Less at the edges, where zeros are padded.
    ratio = np.sqrt((error**2).mean((0, 2, 3)) / variance)
    assert ratio[[0, 1, 3]].min() > 0.8 and ratio.max() < 1.25
    for size in (1, 3):  # an image's outputs do not depend on its batch
        assert np.array_equal(run(model, x[:size])[0], run(model, x)[0][:size])


class Network(nn.Module):
    """Layers in a row, one of them shared, under batch norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = RoutedCondConv2d(8, 16, 3, 2, "same", bias=False, num_experts=3)
        self.norm = nn.BatchNorm2d(16)
        self.router = Router(16, 3)
        self.depthwise = CondConv2d(16, 16, 3, 1, 1, groups=16, bias=False, num_experts=3)
        self.pointwise = CondConv2d(16, 16, 1, bias=False, num_experts=3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        for norm in (self.norm, *self.norms):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
            with torch.no_grad():
                norm.weight[:3] = torch.tensor([0.0, -1.0, 1e-6])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.relu6(self.norm(self.first(x)))
        weights = self.router(x)
        x = self.depthwise(x, weights).relu()
        first, second = (norm(self.pointwise(x, weights)) for norm in self.norms)
        return first.relu() + second, x


@pytest.mark.parametrize(
    ("num_experts", "size", "num_blocks"),
    [(8, 144, 8), (3, 144, 18), (8, 7, 7), (8, 11, 1), (80, 4, 1)],
)
def test_experts_are_cut_into_blocks(num_experts: int, size: int, num_blocks: int) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(-127, 128, (num_experts, size))
    weights = generator.integers(0, 128, (2, num_experts))
    blocks = stack_blocks(codes)
    assert blocks.shape == (num_blocks * num_experts, size // num_blocks)
    rows = np.concatenate([np.kron(np.eye(num_blocks, dtype=int), row) for row in weights])
    assert np.array_equal((rows @ blocks).reshape(2, size), weights @ codes)


def test_layers_in_a_row_hand_on_codes() -> None:
    torch.manual_seed(0)
    network, x = Network(), batch(8)
    model = quantize(network, [x[:4], x[4:]])
    operators = [node.op_type for node in model.graph]
    assert operators.count("Scan") == operators.count("QLinearMatMul") == 4
    assert "BatchNormalization" not in operators and "Relu" not in operators
    assert operators.count("ReduceMean") == 0 and operators.count("MatMulInteger") == 2
    # Of what comes in, and of routing weights: no map between layers is converted.
    assert operators.count("QuantizeLinear") == 1 + 4
    codes = [v for name, v in model.graph.initializers.items() if name.endswith("_int8")]
    assert len(codes) == 3  # the shared layer's are there once
    file = ir.from_proto(ir.to_proto(model))
    assert all(value.uses() for value in file.graph.initializers.values())
    with torch.no_grad():
        expected = [y.numpy() for y in network(x)]
    for actual, wanted in zip(run(model, x), expected, strict=True):
        error = np.abs(actual - wanted).std() / wanted.std()
        assert 0 < error < 0.03
    for size in (1, 3):
        for part, whole in zip(run(model, x[:size]), run(model, x), strict=True):
            assert np.array_equal(part, whole[:size])


def test_pairs_of_products_fit_into_16_bits() -> None:
    """Whatever image comes: without VNNI, ONNX Runtime adds them in 16."""
    torch.manual_seed(0)
    network = Network()
    model = quantize(network, [batch(2) / 10])  # and then sees ten times as much, and more
    products = [
        node for node in model.graph
        if node.op_type == "Scan"
        and any(inner.op_type == "Gemm" for inner in node.attributes["body"].as_graph())
    ]  # fmt: skip
    assert len(products) == 3
    outputs = [value for node in products for value in node.inputs]
    for node in products:
        body = node.attributes["body"].as_graph()
        (clip,) = [inner for inner in body if inner.op_type == "Clip"]
        assert clip.inputs[0] is body.inputs[1] and clip.inputs[2].const_value.numpy() == 127
        assert [user.op_type for user, _ in clip.outputs[0].uses()] == ["Cast"]
    model.graph.outputs[:] = outputs
    for value in outputs:
        value.type = ir.TensorType(ir.DataType.UINT8)
    for factor in (1, 1000):
        maps = run(model, batch(8) * factor)[::2]
        assert [m.dtype for m in maps] == [np.uint8] * 3
        assert max(int(m.max()) for m in maps) == 127


def test_kernels_use_their_codes() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(3, 5, 5, 3, 3)).astype(np.float32)
    weight[1:, 1] = -weight[0, 1] / 2  # experts that cancel
    weight[:, 2] *= 100
    weight[:, 3] = 0
    weight[:, 4] *= 1e-40  # less than a normal number of 32 bits
    routing_weights = generator.uniform(size=(6, 3)).astype(np.float32)
    codes, scale, step = quantize_experts(weight, routing_weights, 63)
    assert codes.dtype == np.int8 and np.abs(codes).max() <= 127
    integers = np.rint(routing_weights * 127) / 127
    mixed = np.tensordot(integers, codes, 1) / step
    assert 62 < np.abs(mixed).max() < 64
    assert np.abs(mixed[:, [0, 4]]).max((0, 2, 3, 4)).min() > 50
    assert np.abs(mixed[:, 1]).max() > 20
    expected = np.tensordot(routing_weights, weight, 1)
    error = np.abs(mixed * step * scale[:, None, None, None] - expected).max((0, 2, 3, 4))
    assert (error <= 0.05 * np.abs(weight).max((0, 2, 3, 4))).all() and error[3] == 0


@pytest.mark.parametrize(("groups", "fold"), [(8, True), (8, False), (1, False)])
def test_a_dead_channel_leaves_the_gain_of_others(groups: int, fold: bool) -> None:
    """Batch norm has 31 times a channel without variance, and others a thousandth of that."""
    torch.manual_seed(0)
    layer = RoutedCondConv2d(8, 8, 3, 1, 1, groups=groups, bias=False, num_experts=3)
    norm = nn.BatchNorm2d(8, eps=1e-3)
    x = batch(8)
    with torch.no_grad():
        layer.weight[:, 0] *= groups == 8  # dead by its kernel, or by its map
        x[:, 0] = 0
        norm.weight.copy_(torch.linspace(0.25, 1, 8))
        norm.weight[0] = 1
        norm.running_var.fill_(64)
        norm.running_var[0] = 0
        norm.bias.normal_(0, 0.01)
    network = nn.Sequential(layer, norm).eval()
    with torch.no_grad():
        expected = network(x).numpy().swapaxes(0, 1).reshape(8, -1)
    found = run(quantize(network, [x], fold=fold), x)[0].swapaxes(0, 1).reshape(8, -1)
    for own, wanted in zip(found[1:], expected[1:], strict=True):
        assert np.polyfit(wanted, own, 1)[0] == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(found[0], expected[0], atol=np.ptp(expected) / 255)


def test_a_model_without_layers() -> None:
    model = export(nn.Conv2d(8, 4, 1))
    assert find_layers(model.graph) == [] and calibrate(model, []) == {}
