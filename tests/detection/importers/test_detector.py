from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import retinanet_resnet50_fpn_v2

from condconv import CondConv2d
from detection.checkpoint import save_checkpoint
from detection.errors import UserError
from detection.importers.detector import load_detector, start_detector
from detection.models.backbones import MobileNetV1, TorchvisionResNet
from detection.models.retinanet import FeaturePyramid, RetinaNet, RetinaNetHead
from detection.models.ssd import SSD, make_extras, make_predictor
from detection.structures import Category

SOURCE = [Category(i, name) for i, name in enumerate(["cat", "dog", "bird"])]
DATA = [Category(i, name) for i, name in enumerate(["ship", "bird", "cat", "tree"])]


def make_network(kind: str, num_classes: int, num_experts: int = 1, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    backbone = MobileNetV1(
        width=0.1, num_experts=num_experts, strides=(16, 32) if kind == "ssd" else (8, 16, 32)
    )
    if kind == "ssd":
        network: Any = SSD(
            backbone=backbone,
            extras=partial(make_extras, width=0.1, num_experts=num_experts),
            head=partial(make_predictor, num_experts=num_experts),
            num_classes=num_classes,
            input_size=64,
        )
    else:
        network = RetinaNet(
            backbone=backbone,
            pyramid=partial(FeaturePyramid, channels=16, norm="batch", separable=True),
            head=partial(
                RetinaNetHead, num_convs=1, norm="batch", separable=True, num_experts=num_experts
            ),
            num_classes=num_classes,
            input_size=64,
        )
    for layer in network.class_layers:  # every slot starts with a bias of its own
        bias = network.get_submodule(layer).bias
        nn.init.normal_(bias)
    return network


def save(path: Path, network: nn.Module, categories: list[Category], **options: Any) -> Path:
    save_checkpoint(path, model=network.state_dict(), config={}, categories=categories, **options)
    return path


def class_logits(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of classes, and of background."""
    with torch.no_grad():
        logits = network.eval()(images).logits
    return logits[..., network.num_background :], logits[..., : network.num_background]


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("kind", ["ssd", "retinanet"])
def test_classes_are_kept_by_name(tmp_path: Path, kind: str, num_experts: int) -> None:
    """With experts or not, what the source computes is computed; new classes start as new."""
    images = torch.randn(2, 3, 64, 64)
    source = make_network(kind, len(SOURCE))
    source.train()
    for _ in range(20):  # batch statistics
        source(torch.randn(8, 3, 64, 64))
    path = save(tmp_path / "a.pt", source, SOURCE)
    network = make_network(kind, len(DATA), num_experts, seed=1)
    lines = load_detector(network, path, DATA)
    assert lines == [
        f"the detector starts from {path}",
        "classes it keeps (2): bird, cat",
        "classes that start anew (2): ship, tree",
        "classes of it that the data lacks (1): dog",
    ]
    expected, expected_background = class_logits(source, images)
    logits, background = class_logits(network, images)
    torch.testing.assert_close(logits[..., 1], expected[..., 2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[..., 2], expected[..., 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(background, expected_background, rtol=1e-3, atol=1e-4)
    fresh = make_network(kind, len(DATA), seed=1)
    slots = len(DATA) + fresh.num_background
    for layer in network.class_layers:
        bias, start = (n.get_submodule(layer).bias.view(-1, slots) for n in (network, fresh))
        if num_experts == 1:
            assert bias[:, [-4, -1]].equal(start[:, [-4, -1]])
    with torch.no_grad():
        deltas, expected_deltas = network(images).deltas, source(images).deltas
    torch.testing.assert_close(deltas, expected_deltas, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ssd", "retinanet"])
def test_a_conditional_source_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    source = make_network(kind, len(SOURCE), num_experts=2)
    path = save(tmp_path / "a.pt", source, SOURCE)
    network = make_network(kind, len(SOURCE), num_experts=2, seed=1)
    load_detector(network, path, SOURCE)
    for name, tensor in network.state_dict().items():
        assert tensor.equal(source.state_dict()[name]), name


def test_the_moving_average_is_taken(tmp_path: Path) -> None:
    source, average = make_network("ssd", 3), make_network("ssd", 3, seed=1)
    path = save(tmp_path / "a.pt", source, SOURCE, ema=average.state_dict())
    network = make_network("ssd", 3, seed=2)
    load_detector(network, path, SOURCE)
    kernel = "backbone.stem.conv.weight"
    assert network.state_dict()[kernel].equal(average.state_dict()[kernel])


def test_no_class_in_common(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", make_network("ssd", 3), SOURCE)
    lines = load_detector(make_network("ssd", 1), path, [Category(1, "cell")])
    assert lines[1:] == [
        "classes it keeps (0): none",
        "classes that start anew (1): cell",
        "classes of it that the data lacks (3): cat, dog, bird",
    ]


@pytest.mark.parametrize(
    ("kind", "num_experts", "words"),
    [
        ("retinanet", 1, "pyramid.laterals.0.convs.0.weight is missing"),
        ("ssd", 2, r"blocks\.5\.router\.linear\.weight is left over"),
    ],
)
def test_another_network(tmp_path: Path, kind: str, num_experts: int, words: str) -> None:
    path = save(tmp_path / "a.pt", make_network("ssd", 3, num_experts), SOURCE)
    with pytest.raises(UserError, match=words):
        load_detector(make_network(kind, 3), path, SOURCE)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_text("no weights")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"model": 3}, tmp_path / "number.pth")
    for name in ("absent.pth", "broken.pth", "list.pth", "number.pth"):
        with pytest.raises(UserError, match=name) as info:
            load_detector(make_network("ssd", 3), tmp_path / name, SOURCE)
        assert "\n" not in str(info.value)


def test_one_start_only() -> None:
    network = make_network("ssd", 3)
    assert start_detector(network, SOURCE, weights=None, backbone_weights=None) == []
    with pytest.raises(UserError, match=r"model.weights.*backbone_weights"):
        start_detector(network, SOURCE, weights="a.pt", backbone_weights="b.pt")


@pytest.fixture(scope="module")
def coco_retinanet() -> Any:
    torch.manual_seed(0)
    network: Any = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    nn.init.normal_(network.head.classification_head.cls_logits.bias)
    return network.eval()


@pytest.mark.parametrize(("local", "num_experts"), [(False, 1), (True, 8)])
@torch.no_grad()
def test_torchvisions_coco_weights(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    coco_retinanet: Any,
    num_experts: int,
    local: bool,
) -> None:
    """Conditional too, the network first gives what torchvision's gives."""
    source = "torchvision:RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1"
    if local:
        source = str(tmp_path / "weights.pth")
        torch.save(coco_retinanet.state_dict(), source)
    monkeypatch.setattr(
        WeightsEnum, "get_state_dict", lambda self, **_: coco_retinanet.state_dict()
    )
    categories = [Category(1, "toothbrush"), Category(2, "ship"), Category(3, "person")]
    network = RetinaNet(
        backbone=TorchvisionResNet("resnet50", num_experts=num_experts),
        pyramid=FeaturePyramid,
        head=partial(RetinaNetHead, norm="group", num_experts=num_experts),
        num_classes=3,
        input_size=64,
        torchvision_anchors=True,
    ).eval()
    lines = load_detector(network, source, categories)
    assert lines[1:] == [
        "classes it keeps (2): toothbrush, person",
        "classes that start anew (1): ship",
        "classes of it that the data lacks (78): bicycle, car, motorcycle, airplane, bus, train, "
        "truck, boat, traffic light, fire hydrant and 68 more",
    ]
    assert any(isinstance(m, CondConv2d) for m in network.modules()) == (num_experts > 1)
    images = torch.randn(2, 3, 64, 64)
    expected = coco_retinanet.head(list(coco_retinanet.backbone(images).values()))
    predictions = network(images)
    torch.testing.assert_close(
        predictions.deltas, expected["bbox_regression"], rtol=1e-3, atol=1e-4
    )
    kept = expected["cls_logits"][..., [90, 1]]
    torch.testing.assert_close(predictions.logits[..., [0, 2]], kept, rtol=1e-3, atol=1e-4)
    assert predictions.logits[..., 1].sigmoid().mean() == pytest.approx(0.01, rel=0.5)
