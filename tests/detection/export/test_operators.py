from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from condconv import CondConv2d, RoutedCondConv2d
from detection.export.operators import fold_norms, translate_condconv2d


class Layers(nn.Module):
    """What an exported layer meets: padding of all kinds, groups, dilation, biases, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.static = nn.Conv2d(4, 4, 1, bias=False)
        self.static_norm = nn.BatchNorm2d(4)
        self.same = RoutedCondConv2d(4, 6, 3, 2, "same", bias=False, num_experts=3)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = RoutedCondConv2d(6, 6, (3, 2), 1, (2, 1), (2, 1), 6, num_experts=2)
        self.norm_of_biases = nn.BatchNorm2d(6)
        self.shared = CondConv2d(6, 6, 1, bias=False, num_experts=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.pointwise = RoutedCondConv2d(6, 4, 1, groups=2, bias=False, num_experts=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_norm(self.static(x)).relu()
        x = self.norm(self.same(x)).relu()
        x = self.norm_of_biases(self.depthwise(x))
        weights = self.depthwise.router(x)
        for norm in self.norms:
            x = norm(self.shared(x, weights))
        return self.pointwise(x)


@pytest.fixture(scope="module")
def layers(calibrate: Callable[..., Any]) -> Layers:
    torch.manual_seed(0)
    network = Layers()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return calibrate(network, images(8))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 4, 12, 11, generator=torch.Generator().manual_seed(batch))


def export(network: nn.Module) -> torch.export.ExportedProgram:
    dims = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        return torch.export.export(network, (images(2),), dynamic_shapes=dims)


def count(program: torch.export.ExportedProgram, target: Any) -> int:
    return len(program.graph.find_nodes(op="call_function", target=target))


def test_batch_norm_folds_where_it_can(layers: Layers) -> None:
    program = export(layers)
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    assert count(program, torch.ops.aten.batch_norm.default) == 5
    fold_norms(program)
    # Left: one behind biases, and two behind a layer that is called twice.
    assert count(program, torch.ops.aten.batch_norm.default) == 3
    for batch in (1, 3):
        with torch.no_grad():
            torch.testing.assert_close(
                program.module()(images(batch)), layers(images(batch)), rtol=1e-4, atol=1e-5
            )
    for name, tensor in layers.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_onnx_computes_the_same(layers: Layers) -> None:
    program = export(layers)
    fold_norms(program)
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=({0: "batch"},),
        custom_translation_table={torch.ops.condconv.exported.default: translate_condconv2d},
    )  # fmt: skip
    assert exported is not None
    with tempfile.TemporaryDirectory() as folder:
        exported.save(Path(folder) / "a.onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "a.onnx")
    operators = [node.op_type for node in exported.model.graph]
    assert operators.count("Scan") == 4
    for batch in (1, 3, 8):
        (y,) = session.run(None, {"x": images(batch).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(y), layers(images(batch)), rtol=1e-4, atol=1e-5
            )
