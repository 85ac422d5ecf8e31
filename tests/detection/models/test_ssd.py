from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from condconv import CondConv2d, Router, count_multiply_adds
from detection.losses import FocalCriterion
from detection.models.ssd import SSD, ssd_mobilenet_v1
from detection.structures import Targets

Calibrate = Callable[[nn.Module, torch.Tensor], Any]


def make_ssd(**arguments) -> SSD:
    torch.manual_seed(0)
    return ssd_mobilenet_v1(
        **{"num_classes": 3, "width": 0.1, "num_experts": 4, "input_size": 64} | arguments
    )


@pytest.mark.parametrize(
    ("width", "num_experts", "millions"),
    [(0.5, 1, 352), (0.75, 1, 730), (1.0, 1, 1230), (0.5, 8, 363), (0.75, 8, 755), (1.0, 8, 1280)],
)
def test_multiply_adds_are_the_papers(width: float, num_experts: int, millions: int) -> None:
    with torch.device("meta"):
        network = ssd_mobilenet_v1(num_classes=90, width=width, num_experts=num_experts)
        multiply_adds = count_multiply_adds(network, torch.zeros(1, 3, 300, 300))
    assert multiply_adds == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("input_size", "grids"), [(300, (19, 10, 5, 3, 2, 1)), (160, (10, 5, 3, 2, 1, 1))]
)
def test_anchors_and_predictions_agree(input_size: int, grids: tuple[int, ...]) -> None:
    network = make_ssd(input_size=input_size).eval()
    images = torch.zeros(2, 3, input_size, input_size)
    levels = network.extract_levels(images)
    assert [tuple(level.shape[2:]) for level in levels] == [(n, n) for n in grids]
    deltas, logits, anchors = network(images)[:3]
    num_anchors = 3 * grids[0] ** 2 + 6 * sum(n**2 for n in grids[1:])
    assert anchors.shape == (num_anchors, 4)
    assert deltas.shape == (2, num_anchors, 4)
    assert logits.shape == (2, num_anchors, 1 + 3)


def test_predictions_follow_the_order_of_the_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature maps that hold their positions, and biases that count levels and anchors."""
    network = make_ssd(num_classes=1, input_size=160)
    sides, levels, expected = (10, 5, 3, 2, 1, 1), [], []
    for level, (side, predictor) in enumerate(zip(sides, network.box_predictors, strict=True)):
        num_anchors = predictor.out_channels // 4
        nn.init.zeros_(predictor.weight)
        predictor.weight.data[:, 0] = 1
        predictor.bias.data = level * 1e4 + torch.arange(num_anchors).repeat_interleave(4) * 1e3
        positions = torch.arange(float(side * side)).view(1, 1, side, side)
        levels.append(positions.expand(-1, predictor.in_channels, -1, -1))
        expected += [
            level * 1e4 + anchor * 1e3 + position
            for position in range(side * side)
            for anchor in range(num_anchors)
        ]
    monkeypatch.setattr(network, "extract_levels", lambda images: levels)
    deltas, _, anchors = network(torch.zeros(1, 3, 160, 160))[:3]
    assert len(anchors) == len(expected)
    for code in range(4):
        assert deltas[0, :, code].tolist() == expected


@pytest.mark.parametrize("num_experts", [1, 4])
def test_every_parameter_has_a_gradient(num_experts: int) -> None:
    network = make_ssd(num_experts=num_experts)
    targets = Targets(
        torch.tensor([[[5.0, 5.0, 60.0, 50.0]], [[0.0, 0.0, 0.0, 0.0]]]),
        torch.tensor([[1], [0]]),
        torch.tensor([[True], [False]]),
    )
    FocalCriterion()(network(torch.randn(2, 3, 64, 64)), targets).total.backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in network.parameters())


@torch.no_grad()
def test_batched_equals_single(calibrate: Calibrate) -> None:
    network = calibrate(make_ssd(), torch.randn(8, 3, 64, 64))
    images = torch.randn(3, 3, 64, 64)
    batched = network(images)
    for i in range(3):
        single = network(images[i : i + 1])
        torch.testing.assert_close(batched.deltas[i], single.deltas[0], rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(batched.logits[i], single.logits[0], rtol=1e-3, atol=2e-4)
    assert (batched.deltas[0] - batched.deltas[1]).abs().mean() > 1e-2, "images differ"


@torch.no_grad()
def test_examples_have_their_own_routing(calibrate: Calibrate) -> None:
    network = calibrate(make_ssd(), torch.randn(8, 3, 64, 64))
    seen = []
    for module in network.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    network(torch.randn(2, 3, 64, 64))
    assert len(seen) == 8 + 4
    for routing_weights in seen:
        assert (routing_weights[0] - routing_weights[1]).abs().max() > 1e-4


def test_static_network_has_no_routing() -> None:
    modules = list(make_ssd(num_experts=1).modules())
    assert not any(isinstance(module, (CondConv2d, Router)) for module in modules)


def test_where_condconv_goes() -> None:
    """Blocks 6 to 13 and the extra layers; the stem, blocks 1 to 5 and predictors are static."""
    network = make_ssd()
    conditional = {
        name for name, module in network.named_modules() if isinstance(module, CondConv2d)
    }
    blocks = {f"backbone.blocks.{i}.layers.{k}.conv" for i in range(5, 13)
              for k in ("depthwise", "pointwise")}  # fmt: skip
    extras = {f"extras.{i}.layers.{k}.conv" for i in range(4) for k in ("reduce", "expand")}
    assert conditional == blocks | extras
    routers = {name for name, module in network.named_modules() if isinstance(module, Router)}
    assert routers == {name.split(".layers")[0] + ".router" for name in conditional}


def test_first_probabilities() -> None:
    network = make_ssd().eval()
    probabilities = network(torch.zeros(1, 3, 64, 64)).logits.sigmoid()
    assert probabilities.min() > 0.005 and probabilities.max() < 0.02


@pytest.mark.parametrize("shape", [(1, 3, 63, 64), (1, 3, 128, 128)])
def test_wrong_input_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="64 x 64"):
        make_ssd()(torch.zeros(shape))


@pytest.mark.parametrize("arguments", [{"width": 0}, {"width": -1.0}, {"num_experts": 0}])
def test_impossible_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_ssd(**arguments)


def test_anchors_are_not_saved() -> None:
    """They follow from the config."""
    assert "anchors" not in make_ssd().state_dict()


def test_building_keeps_batch_norm_fresh() -> None:
    """Tracing the grids must not count as a training step."""
    network = make_ssd()
    assert network.training
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 0
