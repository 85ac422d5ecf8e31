from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from condconv import spread_over_experts
from condconv.backbones import MobileNetV1
from detection.errors import UserError
from detection.importers.backbone import PRETRAINED, load_backbone
from detection.models import backbones
from detection.models.backbones import TimmBackbone, TorchvisionResNet
from detection.models.ssd import ssd_mobilenet_v1


def calibrate(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Batch norm statistics of some images: features of a new network are next to nothing."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    network(images)
    return network.eval()


@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_function_is_kept(num_experts: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 64, 64)
    static = calibrate(ssd_mobilenet_v1(num_classes=2, width=0.1, input_size=64), images)
    network = ssd_mobilenet_v1(num_classes=2, width=0.1, input_size=64, num_experts=num_experts)
    network.load_state_dict(spread_over_experts(static.state_dict(), network))
    ours, expected = network.eval()(images), static(images)
    torch.testing.assert_close(ours.deltas, expected.deltas, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (expected.deltas[0] - expected.deltas[1]).abs().max() > 1e-3, "images differ"


@pytest.mark.parametrize("num_experts", [1, 4])
def test_load_from_timm(tmp_path: Path, num_experts: int) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    weights = timm.create_model("mobilenetv1_100", pretrained=False).state_dict()
    torch.save(weights, tmp_path / "mobilenetv1_100.pth")
    backbone = MobileNetV1(num_experts=num_experts)
    load_backbone(backbone, tmp_path / "mobilenetv1_100.pth")
    kernel = backbone.state_dict()["blocks.12.layers.pointwise.conv.weight"]
    mixed = kernel if num_experts == 1 else kernel.sum(0) / math.sqrt(num_experts)
    torch.testing.assert_close(mixed, weights["blocks.4.1.conv_pw.weight"])
    with pytest.raises(UserError, match="another model"):
        load_backbone(MobileNetV1(width=0.5), tmp_path / "mobilenetv1_100.pth")


@pytest.mark.parametrize(
    "name", ["absent.pth", "broken.pth", "page.pth", "text.pth", "absent.npz", "empty.npz"]
)
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.pth").write_text("no weights")
    (tmp_path / "page.pth").write_text("Repository not found")
    (tmp_path / "text.pth").write_text("hello")
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(UserError):
        load_backbone(MobileNetV1(width=0.1), tmp_path / name)


def test_a_backbone_that_ends_early_takes_the_whole_networks_weights(tmp_path: Path) -> None:
    torch.save(timm.create_model("mobilenetv1_100").state_dict(), tmp_path / "mobilenet.pth")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    mobilenet = backbones.MobileNetV1(strides=(8, 16))
    load_backbone(mobilenet, tmp_path / "mobilenet.pth")
    assert len(mobilenet.blocks) == 11
    load_backbone(TorchvisionResNet("resnet18", strides=(8, 16)), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="another model"):
        load_backbone(TorchvisionResNet("resnet34", strides=(8, 16)), tmp_path / "resnet.pth")


def test_load_from_slim(tmp_path: Path) -> None:
    """A conditional backbone from TF-slim's variables computes what the static one does."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    static = calibrate(MobileNetV1(width=0.5), images)
    variables = {}
    kinds = {"norm.weight": "gamma", "norm.bias": "beta"}
    kinds |= {"norm.running_mean": "moving_mean", "norm.running_var": "moving_variance"}
    layers = {"Conv2d_0": static.stem}
    for number, block in enumerate(static.blocks, start=1):
        layers |= {f"Conv2d_{number}_{kind}": layer for kind, layer in block.layers.items()}
    for scope, layer in layers.items():
        state = layer.state_dict()
        depthwise = scope.endswith("depthwise")
        kernel = state["conv.weight"].permute((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
        name = "depthwise_weights" if depthwise else "weights"
        variables[f"MobilenetV1/{scope}/{name}"] = kernel.numpy()
        for ours, theirs in kinds.items():
            variables[f"MobilenetV1/{scope}/BatchNorm/{theirs}"] = state[ours].numpy()
    np.savez(tmp_path / "slim.npz", **variables)

    backbone = MobileNetV1(width=0.5, num_experts=4).eval()
    load_backbone(backbone, tmp_path / "slim.npz", generator=torch.Generator().manual_seed(0))
    for ours, expected in zip(backbone(images), static(images), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def make_timm(name: str) -> nn.Module:
    return timm.create_model(name)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "make_whole", "name", "num_experts"),
    [
        (TorchvisionResNet, torchvision.models.get_model, "resnet18", 4),
        (TimmBackbone, make_timm, "mobilenetv2_050", 4),
        (TimmBackbone, make_timm, "tf_efficientnet_cc_b0_4e", 1),  # conditional by itself
    ],
)
def test_a_whole_networks_file(
    tmp_path: Path,
    kind: Any,
    make_whole: Callable[[str], nn.Module],
    name: str,
    num_experts: int,
) -> None:
    """Its classifier is left out; a conditional backbone starts with its function."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 64, 64)
    whole = calibrate(make_whole(name), images)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    static = kind(name)
    load_backbone(static, tmp_path / "weights.pth")
    own = {key.removeprefix("network."): value for key, value in static.state_dict().items()}
    state = {key: value for key, value in whole.state_dict().items() if key in own}
    assert len(state) > 50 and all(own[key].equal(value) for key, value in state.items())

    backbone = kind(name, num_experts=num_experts)
    load_backbone(backbone, tmp_path / "weights.pth")
    maps, expected = backbone.eval()(images), static.eval()(images)
    for ours, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
        assert other.std() > 1e-3


@pytest.mark.parametrize(
    "save",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    ],
    ids=["wrapped", "DataParallel", "without counters"],
)
@pytest.mark.parametrize("num_experts", [1, 2])
def test_a_training_scripts_file(
    tmp_path: Path, save: Callable[..., Any], num_experts: int
) -> None:
    """In half the precision too: experts are spread in float32."""
    state = torchvision.models.resnet18().state_dict()
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(save(state), tmp_path / "weights.pth")
    backbone = TorchvisionResNet("resnet18", num_experts=num_experts)
    load_backbone(backbone, tmp_path / "weights.pth")
    kernel = backbone.state_dict()["network.layer4.1.conv2.weight"]
    mixed = kernel if num_experts == 1 else kernel.sum(0) / math.sqrt(num_experts)
    torch.testing.assert_close(mixed, state["layer4.1.conv2.weight"].float())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": 3}, "'' is a int"),
        ({"conv1.weight": [1]}, "'conv1.weight' is a list"),
        ({1: torch.zeros(1)}, "1 is a Tensor"),
    ],
)
@pytest.mark.parametrize("kind", [MobileNetV1, partial(TorchvisionResNet, "resnet18")])
def test_files_without_weights(tmp_path: Path, kind: Any, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"weights.pth holds no weights by name: {words}"):
        load_backbone(kind(), tmp_path / "weights.pth")


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("mobilenetv2_050").state_dict(), tmp_path / "weights.pth")
    for backbone in (TimmBackbone("mobilenetv2_100"), TorchvisionResNet("resnet18")):
        with pytest.raises(UserError, match=r"conv_stem|conv1.weight is missing|is \(.*not"):
            load_backbone(backbone, tmp_path / "weights.pth")


@torch.no_grad()
def test_published_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torchvision.models.resnet18()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: whole.state_dict())
    backbone = TorchvisionResNet("resnet18")
    load_backbone(backbone, PRETRAINED)
    assert backbone.network["layer4"][1].conv2.weight.equal(whole.layer4[1].conv2.weight)


@torch.no_grad()
def test_published_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = timm.create_model("mobilenetv2_050")
    asked = []

    def download(config: Any, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(config)
        return whole.state_dict()

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", download)
    backbone = TimmBackbone("mobilenetv2_050")
    load_backbone(backbone, PRETRAINED)
    assert len(asked) == 1 and "mobilenetv2_050" in str(asked)
    assert backbone.state_dict()["network.conv_stem.weight"].equal(whole.conv_stem.weight)
