from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from detection.build import build_model
from detection.config import plain
from detection.errors import UserError
from detection.losses import FocalCriterion

Config = dict[str, Any]


@pytest.fixture
def make_config(compose_config: Callable[..., Any]) -> Callable[..., Config]:
    def make_config(*overrides: str, model: str = "ssd300_mobilenet_v1") -> Config:
        small = [f"model={model}", "model.input_size=64", "model.width=0.1", "model.num_experts=1"]
        return plain(compose_config("train", [*small, *overrides]))["model"]

    return make_config


def test_parts(make_config: Callable[..., Config]) -> None:
    parts = build_model(make_config("model.criterion.alpha=0.5"), 3)
    assert parts.network.num_classes == 3
    assert parts.preprocess.input_size == 64
    assert isinstance(parts.criterion, FocalCriterion) and parts.criterion.alpha == 0.5


def test_what_training_starts_from_is_no_part(make_config: Callable[..., Config]) -> None:
    build_model(make_config("model.weights=absent.pt"), 3)


def test_normalization_is_the_backbones_unless_given(make_config: Callable[..., Config]) -> None:
    resnet = ("model/backbone=resnet50", "model.backbone.name=resnet18")
    for overrides, mean, std in (
        ((), [127.5] * 3, [127.5] * 3),
        (resnet, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ((*resnet, "model.preprocess.std=2"), [123.675, 116.28, 103.53], [2.0] * 3),
    ):
        preprocess = build_model(make_config(*overrides), 3).preprocess
        assert preprocess.mean.flatten().tolist() == pytest.approx(mean)
        assert preprocess.std.flatten().tolist() == pytest.approx(std)


def test_configs_of_older_checkpoints(make_config: Callable[..., Config]) -> None:
    """The network of a config without sections has the same weights under the same names."""
    old = {
        "_target_": "detection.models.ssd.ssd_mobilenet_v1",
        "num_classes": None,
        "width": 0.1,
        "num_experts": 1,
        "input_size": 64,
        "min_scale": 0.2,
        "max_scale": 0.95,
        "reduce_boxes_in_lowest_layer": True,
        "norm_momentum": 0.03,
        "preprocess": {"_target_": "detection.preprocess.Preprocess", "mean": 127.5, "std": 127.5},
        "criterion": {"_target_": "detection.losses.FocalCriterion", "alpha": 0.75},
        "postprocess": {"_target_": "detection.postprocess.Postprocess"},
    }
    parts, today = build_model(old, 3), build_model(make_config(), 3)
    parts.network.load_state_dict(today.network.state_dict())
    assert parts.network.anchors.equal(today.network.anchors)


def test_class_counts_must_agree(make_config: Callable[..., Config]) -> None:
    assert build_model(make_config("model.num_classes=3"), 3).network.num_classes == 3
    with pytest.raises(UserError, match="the data has 4 classes"):
        build_model(make_config("model.num_classes=3"), 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_target_": "os.system"}, "'os.system'; allowed are"),
        ({"backbone": {"_target_": "os.system"}}, "'os.system'; allowed are"),
        ({"head": {"_target_": "os.system", "_partial_": True}}, "'os.system'; allowed are"),
        ({"extra": [{"x": {"_target_": "os.system"}}]}, "'os.system'; allowed are"),
        ({"criterion": {"_target_": "os.system"}}, "'os.system'; allowed are"),
        ({"criterion": {}}, "None; allowed are"),
        ({"extra": "${oc.create:{_target_:pathlib.Path}}"}, "pathlib.Path}}'; allowed are"),
        ({"extra": [{"x": "${oc.env:HOME}"}]}, "HOME}'; allowed are"),
        ({"anchorz": 1}, "anchorz"),
        ({"backbone": {"_target_": "detection.models.backbones.MobileNetV1", "widht": 1}}, "widht"),
        (
            {"backbone": {"_target_": "detection.models.backbones.TimmBackbone", "name": "nonet"}},
            "TimmBackbone: timm cannot make nonet",
        ),
        (
            {
                "backbone": {
                    "_target_": "detection.models.backbones.TimmBackbone",
                    "name": "swinv2_cr_tiny_ns_224",
                }
            },
            "the backbone cannot take images of 64 x 64",
        ),
        ({"head": {"_target_": "detection.models.ssd.make_predictor", "_partial_": True,
                   "experts": 2}}, "experts"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(
    make_config: Callable[..., Config], change: Config, words: str
) -> None:
    with pytest.raises(UserError, match=words) as info:
        build_model(make_config() | change, 3)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:a/b", "local-dir:/tmp"])
def test_no_config_has_timm_fetch_a_network(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def create_model(*_: Any, **__: Any) -> None:
        pytest.fail("timm is asked")

    monkeypatch.setattr("timm.create_model", create_model)
    backbone = {"_target_": "detection.models.backbones.TimmBackbone", "name": name}
    with pytest.raises(UserError, match=f"name={name}: give a name of timm's own list"):
        build_model(make_config() | {"backbone": backbone}, 3)
