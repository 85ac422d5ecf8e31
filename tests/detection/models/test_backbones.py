from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from condconv import CondConv2d, Router, backbones, count_multiply_adds
from detection.models.backbones import Backbone, MobileNetV1, TimmBackbone, TorchvisionResNet

# Of every kind: a constructor's first arguments, and the networks' own stride-8 channels.
KINDS: dict[str, tuple[Callable[..., Backbone], list[int]]] = {
    "mobilenet_v1": (lambda **kw: MobileNetV1(width=0.25, **kw), [64, 128, 256]),
    "resnet18": (lambda **kw: TorchvisionResNet("resnet18", **kw), [128, 256, 512]),
    "timm": (lambda **kw: TimmBackbone("mobilenetv2_050", **kw), [16, 48, 160]),
    "timm flattened": (lambda **kw: TimmBackbone("convnext_atto", **kw), [80, 160, 320]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strides", [(8, 16, 32), (16, 32), (8,)])
@torch.no_grad()
def test_maps(kind: str, strides: tuple[int, ...]) -> None:
    make, channels = KINDS[kind]
    torch.manual_seed(0)
    whole = make(strides=(8, 16, 32)).eval()
    torch.manual_seed(0)
    backbone = make(strides=strides).eval()
    backbone.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(1, 3, 96, 64)
    expected = dict(zip((8, 16, 32), whole(images), strict=True))
    assert list(backbone.strides) == list(strides)
    assert backbone.channels == [channels[(8, 16, 32).index(stride)] for stride in strides]
    for stride, own, own_channels in zip(strides, backbone(images), backbone.channels, strict=True):
        assert own.shape == (1, own_channels, 96 // stride, 64 // stride)
        torch.testing.assert_close(own, expected[stride])
    # No layer without a use, whose parameters had no gradient; timm keeps its EfficientNets whole.
    fewer = len(list(backbone.parameters())) < len(list(whole.parameters()))
    assert fewer == (32 not in strides and kind != "timm")


@torch.no_grad()
def test_mobilenet_v1_is_condconvs() -> None:
    torch.manual_seed(0)
    expected, backbone = (
        backbones.MobileNetV1(width=0.25, num_experts=2),
        MobileNetV1(width=0.25, num_experts=2),
    )
    backbone.load_state_dict(expected.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for own, other in zip(backbone.eval()(images), expected.eval()(images), strict=True):
        assert own.equal(other)


@torch.no_grad()
def test_resnet_is_torchvisions() -> None:
    network = torchvision.models.resnet18().eval()
    backbone = TorchvisionResNet("resnet18", strides=(32,)).eval()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    backbone.network.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    (own,) = backbone(images)
    torch.testing.assert_close(network.fc(own.mean((2, 3))), network(images))


@torch.no_grad()
def test_timms_condconv_runs_with_ours() -> None:
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_cc_b0_4e", features_only=True).eval()
    backbone = TimmBackbone("tf_efficientnet_cc_b0_4e", strides=(8, 32)).eval()
    backbone.network.load_state_dict(network.state_dict())
    kinds = {type(m) for m in backbone.modules() if type(m).__name__.endswith("CondConv2d")}
    assert kinds and all(issubclass(kind, CondConv2d) for kind in kinds)
    images = torch.randn(2, 3, 64, 64)
    expected = network(images)
    for own, other in zip(backbone(images), (expected[2], expected[4]), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert backbone.normalization["mean"] == [127.5] * 3


@pytest.mark.parametrize(
    ("make", "conditional"),
    [
        (
            lambda: TorchvisionResNet("resnet50", num_experts=2),
            [f"layer4.{block}.conv{i}" for block in range(3) for i in (1, 2, 3)],
        ),
        (
            lambda: TimmBackbone("resnet50", num_experts=2),
            [f"layer4.{block}.conv{i}" for block in range(3) for i in (1, 2, 3)],
        ),
        (
            lambda: TimmBackbone("mobilenetv2_100", num_experts=2),
            [
                f"blocks.{block}.conv_{kind}"
                for block in ("4.1", "4.2", "5.0", "5.1", "5.2", "6.0")
                for kind in ("pw", "dw", "pwl")
            ],
        ),
        (
            lambda: TimmBackbone("mobilenetv3_small_050", num_experts=2, num_conditional_blocks=1),
            ["blocks.5.0.conv"],
        ),
    ],
)
def test_what_is_conditional(make: Callable[[], Backbone], conditional: list[str]) -> None:
    """The paper's blocks, with one routing each; their shortcuts stay static."""
    with torch.device("meta"):
        backbone: Any = make()
    layers = [n for n, m in backbone.network.named_modules() if isinstance(m, CondConv2d)]
    assert layers == conditional
    routers = [n for n, m in backbone.network.named_modules() if isinstance(m, Router)]
    blocks = {layer.rpartition(".")[0] for layer in layers}
    assert set(routers) == {f"{block}.router" for block in blocks}


def test_resnet50_costs_what_the_paper_says() -> None:
    """4093M and 4213M multiply-adds with the classifier: 2M, and 16M for its 8 experts."""
    with torch.device("meta"):
        static, conditional = (
            count_multiply_adds(
                TorchvisionResNet("resnet50", num_experts=num_experts),
                torch.zeros(1, 3, 224, 224, device="meta"),
            )
            for num_experts in (1, 8)
        )
    assert (static + 2.05e6) / 1e6 == pytest.approx(4093, rel=0.01)
    assert (conditional - static + 16.4e6) / 1e6 == pytest.approx(4213 - 4093, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_frozen_stages(kind: str, batch_norm: bool) -> None:
    """Up to stride 8 nothing learns, above it all but batch norm, where that is frozen."""
    torch.manual_seed(0)
    backbone = KINDS[kind][0](strides=(8, 16, 32), frozen_stages=3, freeze_batch_norm=batch_norm)
    inference = copy.deepcopy(backbone).eval()
    backbone.eval()
    backbone.train()
    images = torch.randn(2, 3, 64, 64)
    maps = backbone(images)
    assert not maps[0].requires_grad and maps[0].equal(inference(images)[0])
    assert all(m.requires_grad for m in maps[1:])
    sum(m.square().mean() for m in maps[1:]).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())

    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    learning = [any(p.requires_grad for p in norm.parameters()) for norm in norms]
    assert [bool(norm.num_batches_tracked) for norm in norms] == learning
    assert any(learning) == (not batch_norm and bool(norms))

    # Synchronising puts other modules in their places.
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(backbone)).train()
    modes = [
        [m.training for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for network in (backbone, synchronized)
    ]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_frozen_by_default(kind: str) -> None:
    backbone = KINDS[kind][0]()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MobileNetV1(strides=(16, 64)), "strides 2, 4, 8, 16, 32: it cannot give 16, 64"),
        (lambda: MobileNetV1(strides=(32, 16)), "cannot give 32, 16; give them ascending"),
        (lambda: TorchvisionResNet("resnet18", strides=()), "cannot give none"),
        (lambda: TorchvisionResNet("vgg16"), "no ResNet of torchvision"),
        (lambda: TorchvisionResNet("resnet19"), "resnet19"),
        (lambda: TimmBackbone("nonet"), "timm cannot make nonet: Unknown model"),
        (lambda: TimmBackbone("vit_tiny_patch16_224"), "strides 16: it cannot give 8, 16, 32"),
        (lambda: TimmBackbone("swin_tiny_patch4_window7_224"), "channels last"),
        (lambda: TimmBackbone("convnext_atto", num_experts=2), "set num_conditional_blocks"),
        (
            lambda: TimmBackbone("regnety_002", num_experts=2, num_conditional_blocks=3),
            "3 blocks of regnety_002 cannot be conditional: 0 are found, which are looked for in",
        ),
        (lambda: TimmBackbone("hrnet_w18_small", frozen_stages=1), "set frozen_stages=0"),
    ],
)
def test_what_cannot_serve_is_refused(make: Callable[[], Backbone], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as info:
        make()
    assert "\n" not in str(info.value)
