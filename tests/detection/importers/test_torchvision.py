"""Equal outputs are tested in tests/detection/test_parity_torchvision.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2

from detection.build import build_model
from detection.checkpoint import load_weights
from detection.config import plain
from detection.errors import UserError
from detection.importers.torchvision import (
    PUBLISHED,
    download_weights,
    load_torchvision_retinanet,
    read_weights,
)
from detection.models.backbones import TorchvisionResNet
from detection.models.retinanet import FeaturePyramid, RetinaNet, RetinaNetHead

State = dict[str, Tensor]


def make_retinanet(num_classes: int = 2) -> RetinaNet:
    return RetinaNet(
        backbone=TorchvisionResNet("resnet50"),
        pyramid=partial(FeaturePyramid, extra_from="p5"),
        head=RetinaNetHead,
        num_classes=num_classes,
        input_size=64,
        torchvision_anchors=True,
    )


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Run as the first published weights are: with no epsilon in the batch norm."""
    torch.manual_seed(0)
    network = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    for module in network.backbone.body.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 0.01  # small variances, where an epsilon counts
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum, module.eps = 1.0, 1e-12  # training refuses 0
    with torch.no_grad():
        network.backbone(torch.randn(4, 3, 64, 64))
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return network.eval()


def as_published_first(state: State) -> State:
    """The names of the first format, and batch norm without counters."""
    old = {}
    for name, tensor in state.items():
        name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0", r"\1", name)
        name = re.sub(r"(_head\.conv)\.(\d)\.0", lambda m: f"{m[1]}.{2 * int(m[2])}", name)
        if not name.endswith("num_batches_tracked"):
            old[name] = tensor
    return old


def test_first_format(theirs: Any) -> None:
    state = theirs.state_dict()
    old = as_published_first(state)
    assert "head.regression_head.conv.6.bias" in old
    assert "backbone.fpn.inner_blocks.0.weight" in old
    expected, converted = load_torchvision_retinanet(state), load_torchvision_retinanet(old)
    assert expected.keys() == converted.keys()
    assert all(converted[name].equal(tensor) for name, tensor in expected.items())
    load_weights(make_retinanet(), converted)


@torch.no_grad()
@pytest.mark.parametrize(("norm_epsilon", "carried"), [(0.0, True), (1e-5, False)])
def test_epsilon(theirs: Any, norm_epsilon: float, carried: bool) -> None:
    ours, images = make_retinanet().eval(), torch.randn(1, 3, 64, 64)
    state = load_torchvision_retinanet(theirs.state_dict(), norm_epsilon=norm_epsilon)
    load_weights(ours, state)
    # The first map: behind these tiny variances float32's own noise grows from layer to layer.
    own, expected = ours.backbone(images)[0], theirs.backbone.body(images)["0"]
    assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4) == carried


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone.body.layer1.0.conv1.weight": None}, "layer1.0.conv1.weight is missing"),
        ({"head.regression_head.bbox_reg.bias": None}, "box_predictor.convs.0.bias is missing"),
        ({"roi_heads.box_head.fc6.bias": torch.zeros(3)}, "roi_heads.box_head.fc6.bias is of no"),
        ({"backbone.body.layer5.0.weight": torch.zeros(3)}, "layer5.0.weight is left over"),
        ({"backbone.fpn.extra_blocks.p6.weight": torch.zeros(256, 2048, 3, 3)},
         r"extras.0.convs.0.weight is \(256, 2048, 3, 3\), not \(256, 256, 3, 3\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(theirs: Any, change: dict[str, Any], words: str) -> None:
    state = {k: v for k, v in (theirs.state_dict() | change).items() if v is not None}
    with pytest.raises(UserError, match=words):
        load_weights(make_retinanet(), load_torchvision_retinanet(state))


def test_class_names_of_a_file(theirs: Any) -> None:
    state = theirs.state_dict()
    assert read_weights(Path("any.pth"), state)[1] == ["", ""]
    for key in ("weight", "bias"):
        name = f"head.classification_head.cls_logits.{key}"
        state[name] = state[name].repeat(50, *[1] * (state[name].dim() - 1))[: 9 * 91]
    names = read_weights(Path("any.pth"), state)[1]
    assert len(names) == 91 and names[1] == "person" and names[90] == "toothbrush"
    with pytest.raises(UserError, match=r"any.pth is no RetinaNet.*box_predictor"):
        read_weights(Path("any.pth"), {})


def test_a_published_file_is_known_by_its_name(theirs: Any) -> None:
    path = Path("somewhere") / Path(PUBLISHED[0].url).name
    state, names = read_weights(path, theirs.state_dict())
    assert names == PUBLISHED[0].meta["categories"]
    expected = load_torchvision_retinanet(theirs.state_dict(), norm_epsilon=0.0)
    assert all(state[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("weights", PUBLISHED)
def test_download(theirs: Any, monkeypatch: pytest.MonkeyPatch, weights: WeightsEnum) -> None:
    def get_state_dict(self: WeightsEnum, **options: Any) -> State:
        assert self is weights and options["check_hash"]
        return theirs.state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    state, names = download_weights(str(weights))
    assert names == weights.meta["categories"]
    epsilon = 0.0 if weights is PUBLISHED[0] else 1e-5
    expected = load_torchvision_retinanet(theirs.state_dict(), norm_epsilon=epsilon)
    assert all(state[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["nothing", "ResNet50_Weights.IMAGENET1K_V1", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UserError, match=r"give RetinaNet_ResNet50_FPN_Weights.COCO_V1 or"):
        download_weights(name)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"cannot download https.*Name or service.*give the file"):
        download_weights(str(PUBLISHED[1]))


@pytest.mark.parametrize(
    ("make", "overrides"),
    [
        (retinanet_resnet50_fpn_v2, []),
        (retinanet_resnet50_fpn, ["model.head.norm=null", "model.pyramid.extra_from=p5"]),
    ],
)
def test_the_shipped_config_takes_the_published_form(
    compose_config: Callable[..., Any], make: Callable[..., nn.Module], overrides: list[str]
) -> None:
    """With the overrides that docs/models.md gives."""
    config = plain(compose_config("train", ["model=retinanet", *overrides]))["model"]
    with torch.device("meta"):
        network = build_model(config, 91).network
        state = make(weights=None, weights_backbone=None, num_classes=91).state_dict()
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    given = load_torchvision_retinanet(state)
    assert {key: tensor.shape for key, tensor in given.items()} == shapes
