"""The paper's six detectors: their recipe's numbers, their cost, and that each of them trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from condconv import CondConv2d, count_multiply_adds
from detection.build import ModelParts, build_model
from detection.config import config_dir, plain
from detection.data.shapes import Recipe, provide
from detection.engine.optimization import build_optimizer, build_schedule
from detection.engine.run_folder import RunFolder
from detection.engine.settings import TrainerSettings, read_section
from detection.overrides import check_overrides
from train_det import train

# Width, experts and the paper's multiply-adds in millions.
PAPER = {
    "ssd300_mobilenet_v1_050_static": (0.5, 1, 352),
    "ssd300_mobilenet_v1_050_condconv": (0.5, 8, 363),
    "ssd300_mobilenet_v1_075_static": (0.75, 1, 730),
    "ssd300_mobilenet_v1_075_condconv": (0.75, 8, 755),
    "ssd300_mobilenet_v1_100_static": (1.0, 1, 1230),
    "ssd300_mobilenet_v1_100_condconv": (1.0, 8, 1280),
}
ONE_GPU = "paper/_recipe_one_gpu"
NAME = "ssd300_mobilenet_v1_050_condconv"  # where all are alike


@pytest.fixture
def compose_experiment(compose_config: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    def compose(name: str, *overrides: str, one_gpu: bool = False) -> dict[str, Any]:
        choice = f"[paper/{name},{ONE_GPU}]" if one_gpu else f"paper/{name}"
        overrides = (f"experiment={choice}", "data.root=DIR", *overrides)
        check_overrides("train", list(overrides))
        return plain(compose_config("train", overrides))

    return compose


@pytest.fixture(scope="session")
def coco_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few generated images in the official layout of COCO."""
    recipe = Recipe(num_train=6, num_val=4, image_size=(64, 80), empty=0.0)
    root = provide(recipe, tmp_path_factory.mktemp("coco"))
    for split in ("train", "val"):
        (root / "images" / split).rename(root / f"{split}2017")
        annotations = root / "annotations" / f"instances_{split}.json"
        annotations.rename(annotations.with_stem(f"instances_{split}2017"))
    return root


def build_meta(content: dict[str, Any]) -> ModelParts:
    """The detector for COCO's 90 class slots, shapes only."""
    with torch.device("meta"):
        return build_model(content["model"], 90)


def test_the_six_are_there():
    files = {path.stem for path in (config_dir() / "experiment" / "paper").glob("ssd*.yaml")}
    assert files == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_they_differ_in_width_and_experts_only(compose_experiment: Callable[..., Any], name: str):
    width, num_experts, _ = PAPER[name]
    changed = (f"model.width={width}", f"model.num_experts={num_experts}", "run_dir=x")
    assert compose_experiment(name, "run_dir=x") == compose_experiment(NAME, *changed)


def test_recipe(compose_experiment: Callable[..., Any]):
    content = compose_experiment(NAME)
    settings = read_section(TrainerSettings, "trainer", content["trainer"])
    assert (settings.batch_size, settings.steps) == (1024, 20000)
    assert settings.ema_decay is None
    assert settings.gradient_clip_norm is None
    assert settings.early_stopping is None
    assert not settings.freeze_batch_norm
    for world_size in (1, 2, 8):
        settings.check_shares(world_size)
    optimizer = {"lr": 0.9, "momentum": 0.9, "nesterov": False, "weight_decay": 4e-5}
    assert content["optimizer"].items() >= {"_target_": "torch.optim.SGD", **optimizer}.items()
    assert content["data"]["_target_"] == "detection.data.sources.coco"
    assert content["data"]["augmentation"] == {
        "crop": "ssd",
        "crop_areas": [0.1, 1.0],
        "crop_aspect_ratios": [0.5, 2.0],
        "horizontal_flip": 0.5,
        "vertical_flip": 0.0,
        "photometric": 0.0,
        "zoom_out": 0.0,
        "mosaic": 0.0,
        "mixup": 0.0,
        "multi_scale": None,
        "on_device": None,
        "max_boxes": 100,
    }


@pytest.mark.parametrize("name", PAPER)
def test_detector(compose_experiment: Callable[..., Any], name: str):
    width, num_experts, multiply_adds = PAPER[name]
    content = compose_experiment(name)
    assert content["model"]["width"] == width
    network = build_meta(content).network
    experts = {m.num_experts for m in network.modules() if isinstance(m, CondConv2d)}
    assert experts == ({num_experts} if num_experts > 1 else set())
    cost = count_multiply_adds(network, torch.zeros(1, 3, 300, 300, device="meta"))
    assert cost / 1e6 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize(("one_gpu", "scale"), [(False, 1), (True, 8)])
def test_learning_rates(compose_experiment: Callable[..., Any], one_gpu: bool, scale: int):
    """One GPU takes an eighth of the batch at an eighth of the rate, for eight times the steps."""
    content = compose_experiment(NAME, one_gpu=one_gpu)
    optimizer = build_optimizer(content["optimizer"], nn.Conv2d(1, 1, 1))
    schedule = build_schedule(content["schedule"], optimizer)
    rates = [schedule.get_last_lr()[0]]
    for step in (500, 1000, 10500, 20000):
        schedule.last_epoch = step * scale - 1  # going there step by step takes half a minute
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    expected = [rate / scale for rate in (0.3, 0.6, 0.9, 0.45, 0.0)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert content["trainer"]["steps"] == 20000 * scale
    assert content["trainer"]["batch_size"] == 1024 // scale


def test_one_gpu_changes_nothing_else(compose_experiment: Callable[..., Any]):
    paper, scaled = compose_experiment(NAME), compose_experiment(NAME, one_gpu=True)
    changed = {
        f"{section}.{key}"
        for section in paper.keys() - {"run_dir"}
        if isinstance(paper[section], dict)
        for key in paper[section]
        if paper[section][key] != scaled[section][key]
    }
    assert changed == {
        "optimizer.lr",
        "schedule.steps",
        "schedule.warmup_steps",
        *(f"trainer.{key}" for key in ("steps", "batch_size", "num_micro_batches")),
        "trainer.evaluate_every",
    }


@pytest.mark.parametrize("name", ["ssd300_mobilenet_v1_050_static", NAME])
def test_weight_decay_is_of_kernels_only(compose_experiment: Callable[..., Any], name: str):
    content = compose_experiment(name)
    network = build_meta(content).network
    optimizer = build_optimizer(content["optimizer"], network)
    decays = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for path, parameter in network.named_parameters():
        is_kernel = path.endswith("weight") and not path.endswith(("norm.weight", "linear.weight"))
        assert decays.pop(id(parameter)) == (4e-5 if is_kernel else 0.0), path
    assert not decays


@pytest.mark.parametrize(
    "choice",
    ["paper/ssd300_mobilenet_v1_050_static", f"[paper/{NAME},{ONE_GPU}]"],
)
def test_two_steps_on_a_folder_like_coco(
    compose_config: Callable[..., Any],
    tiny_model: list[str],
    coco_like: Path,
    tmp_path: Path,
    choice: str,
):
    """Smaller images and batches; the rest is the paper's, accumulation too."""
    ids = tmp_path / "minival.txt"
    ids.write_text("2\n4\n")
    overrides = [
        f"experiment={choice}",
        *(word for word in tiny_model if not word.startswith(("model.width", "model.num_exp"))),
        f"data.root={coco_like}",
        f"data.val.ids={ids}",
        "trainer.steps=2",
        "trainer.num_micro_batches=2",
        f"run_dir={tmp_path / 'run'}",
    ]
    train(compose_config("train", overrides))
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # of hundreds of megabytes
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert all(0 < line["loss"] < 100 for line in lines)
    detections = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert {detection["image_id"] for detection in detections} == {2, 4}
