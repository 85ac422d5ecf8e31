"""What every shipped model does, whatever it is: small ones of each config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from condconv import CondConv2d
from detection.build import ModelParts, build_model
from detection.checkpoint import save_checkpoint
from detection.config import config_dir, plain
from detection.detector import Detector
from detection.models.anchor_network import AnchorNetwork
from detection.structures import Category, ImageDetections, Targets

Calibrate = Callable[[nn.Module, torch.Tensor], Any]

MODELS = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
BACKBONES = sorted(path.stem for path in (config_dir() / "model" / "backbone").glob("*.yaml"))
CATEGORIES = [Category(1, "a"), Category(2, "b"), Category(5, "c")]
SIZE = 64
# What keeps a model small, where it has the key.
SMALL = {
    "model.input_size": SIZE,
    "model.width": 0.25,
    "model.pyramid.channels": 64,
    "model.head.num_convs": 1,
    "model.postprocess.score_threshold": 1e-8,
}
SMALL_BACKBONES = {"resnet50": "resnet18", "timm": "mobilenetv3_small_050"}


def compose_model(
    compose_config: Callable[..., Any], *choices: str, backbone: str | None = None
) -> Any:
    name = SMALL_BACKBONES.get(backbone or "")
    overrides = [*choices, *([f"model.backbone.name={name}"] if name else [])]
    config = compose_config("train", overrides)
    small = [f"{key}={value}" for key, value in SMALL.items() if _has(config, key)]
    return plain(compose_config("train", [*overrides, *small]))["model"]


def _has(config: Any, key: str) -> bool:
    for word in key.split("."):
        if word not in config:
            return False
        config = config[word]
    return True


def check_training(parts: ModelParts) -> None:
    """Every trainable parameter has a gradient."""
    targets = Targets(
        torch.tensor([[[5.0, 5.0, 60.0, 50.0], [0.0, 8.0, 12.0, 20.0]], [[0.0] * 4] * 2]),
        torch.tensor([[1, 2], [0, 0]]),
        torch.tensor([[True, True], [False, False]]),
    )
    parts.network.train()
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    losses = parts.criterion(parts.network(parts.preprocess(images)), targets)
    assert losses.divisor > 0
    assert all(loss > 0 and loss.isfinite() for loss in losses.sums.values())
    losses.total.backward()
    for name, parameter in parts.network.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        # A predictor of a level without objects learns nothing of boxes.
        if name.startswith("backbone.") and parameter.dim() > 1 and parameter.requires_grad:
            assert parameter.grad.any(), name


def assert_same(ours: ImageDetections, expected: ImageDetections, tolerance: float) -> None:
    assert len(ours.scores) == len(expected.scores) > 0
    for field, expected_field in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(field, expected_field, rtol=tolerance, atol=tolerance)


def check_model(calibrate: Calibrate, config: Any, folder: Path) -> nn.Module:
    """Training, detections, and a checkpoint that gives the same; returns the network."""
    torch.manual_seed(0)
    parts = build_model(config, len(CATEGORIES))
    check_training(parts)

    calibrate(parts.network, torch.randn(8, 3, SIZE, SIZE))
    parts.network.to(memory_format=torch.channels_last)  # as a checkpoint is loaded
    detector = Detector(parts, CATEGORIES)
    pictures = [np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
                for i, shape in enumerate([(50, 90, 3), (80, 40, 3), (64, 64, 3)])]  # fmt: skip
    together = detector.predict(pictures)
    for picture, found in zip(pictures, together, strict=True):
        height, width, _ = picture.shape
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([width, height] * 2)).all()
        # A detection does not depend on which images share its batch.
        (alone,) = detector.predict(picture)
        torch.testing.assert_close(alone.scores, found.scores, rtol=1e-3, atol=1e-4)

    path = folder / "checkpoint.pt"
    save_checkpoint(
        path, model=parts.network.state_dict(), config={"model": config}, categories=CATEGORIES
    )
    for ours, expected in zip(
        Detector.from_checkpoint(path).predict(pictures), together, strict=True
    ):
        assert_same(ours, expected, tolerance=0)
    return parts.network


@pytest.mark.parametrize("num_experts", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_model(
    calibrate: Calibrate,
    compose_config: Callable[..., Any],
    tmp_path: Path,
    model: str,
    num_experts: int,
) -> None:
    choices = (f"model={model}", f"model.num_experts={num_experts}")
    backbone = "resnet50" if model == "retinanet" else None
    network = check_model(
        calibrate, compose_model(compose_config, *choices, backbone=backbone), tmp_path
    )
    assert bool(find_conditional(network)) == (num_experts > 1)


def find_conditional(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, CondConv2d)]


@pytest.mark.parametrize(
    ("model", "key", "names"),
    [
        ("ssd300_mobilenet_v1", "backbone", "backbone"),
        ("ssd300_mobilenet_v1", "extras", "extras"),
        ("ssd300_mobilenet_v1", "head", "class_predictors box_predictors"),
        ("ssdlite320_mobilenet_v1", "head", "class_predictors box_predictors"),
        ("retinanet_mobilenet_v1_fpnlite", "head", "head"),
    ],
)
def test_each_part_has_its_own_switch(
    compose_config: Callable[..., Any], model: str, key: str, names: str
) -> None:
    choices = (f"model={model}", "model.num_experts=1", f"model.{key}.num_experts=2")
    parts = build_model(compose_model(compose_config, *choices), len(CATEGORIES))
    conditional = {name.partition(".")[0] for name in find_conditional(parts.network)}
    assert conditional == set(names.split())
    check_training(parts)


@pytest.mark.parametrize("model", MODELS)
def test_another_size_is_that_of_a_network_built_for_it(
    compose_config: Callable[..., Any], model: str
) -> None:
    backbone = "resnet50" if model == "retinanet" else None
    config = compose_model(compose_config, f"model={model}", backbone=backbone)
    torch.manual_seed(0)
    network = build_model(config, len(CATEGORIES)).network.eval()
    assert isinstance(network, AnchorNetwork)
    network.take_sizes([64, 80, 160])
    for size in (80, 160, 64):
        built = build_model({**config, "input_size": size}, len(CATEGORIES)).network.eval()
        built.load_state_dict(network.state_dict())
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            ours, expected = network(images), built(images)
        for field, other in zip(ours[:3], expected[:3], strict=True):
            assert field.equal(other)
        assert ours[3:] == expected[3:]
        assert sum(ours.level_sizes) == len(ours.anchors) == ours.deltas.shape[1]
    for shape in ((96, 96), (80, 160)):
        with pytest.raises(ValueError, match="takes 64 x 64 images"):
            network(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize(
    ("detector", "num_experts"), [("ssd300_mobilenet_v1", 2), ("retinanet", 1)]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone(
    calibrate: Calibrate,
    compose_config: Callable[..., Any],
    tmp_path: Path,
    detector: str,
    backbone: str,
    num_experts: int,
) -> None:
    """Every detector takes every backbone."""
    choices = (
        f"model={detector}",
        f"model/backbone={backbone}",
        f"model.num_experts={num_experts}",
        *(["model.backbone.num_conditional_blocks=1"] if backbone == "timm" else []),
    )
    network = check_model(
        calibrate, compose_model(compose_config, *choices, backbone=backbone), tmp_path
    )
    conditional = any(name.startswith("backbone.") for name in find_conditional(network))
    assert conditional == (num_experts > 1 or backbone == "efficientnet_cc_b0")


@pytest.mark.parametrize(
    "model", ["ssd300_mobilenet_v1", "ssdlite320_mobilenet_v1", "retinanet_mobilenet_v1_fpnlite"]
)
def test_every_batch_norm_has_the_momentum(compose_config: Callable[..., Any], model: str):
    config = compose_model(compose_config, f"model={model}", "model.norm_momentum=0.2")
    network = build_model(config, len(CATEGORIES)).network
    norms = [child for child in network.modules() if isinstance(child, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.2} and len(norms) > 27
