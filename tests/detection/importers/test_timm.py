from __future__ import annotations

import pytest
import torch

from condconv.backbones import MobileNetV1
from detection.errors import UserError
from detection.importers.timm import load_timm_mobilenet_v1

timm = pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    # Odd at every layer, where "same" padding is timm's.
    return torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network(images: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv1_100", pretrained=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data *= 0.05  # small variances, where the epsilon counts
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network(images)
    return network.eval()


def test_function_is_timms(network: torch.nn.Module, images: torch.Tensor) -> None:
    backbone = MobileNetV1()
    backbone.load_state_dict(load_timm_mobilenet_v1(network.state_dict()))
    with torch.no_grad():
        expected = network.forward_features(images)
        _, features = backbone.eval()(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_wider_network() -> None:
    state = timm.create_model("mobilenetv1_125", pretrained=False).state_dict()
    MobileNetV1(width=1.25).load_state_dict(load_timm_mobilenet_v1(state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_head.weight": torch.zeros(1)}, "conv_head.weight is left over"),
        ({"blocks.1.0.conv_pw.weight": None}, "pointwise.conv.weight is missing"),
        ({"conv_stem.weight": torch.zeros(32, 1, 3, 3)}, "stem.conv.weight is"),
    ],
)
def test_what_does_not_fit_is_named(network: torch.nn.Module, change: dict, words: str) -> None:
    changed = network.state_dict() | change
    with pytest.raises(UserError, match=words):
        load_timm_mobilenet_v1({k: v for k, v in changed.items() if v is not None})


@pytest.mark.parametrize("name", ["mobilenetv1_100h", "resnet18"])
def test_other_networks_are_refused(name: str) -> None:
    state = timm.create_model(name, pretrained=False).state_dict()
    with pytest.raises(UserError):
        load_timm_mobilenet_v1(state)


def test_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="conv_pw"):
        load_timm_mobilenet_v1({})
