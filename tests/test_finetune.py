"""`experiment=finetune`: a detector of some classes becomes one of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.checkpoint import load_checkpoint
from detection.data.shapes import Recipe, provide
from detection.errors import UserError
from train_det import train


@pytest.fixture(scope="module")
def shapes(shapes_root: Path) -> Path:
    return provide(Recipe(num_train=10, num_val=5, image_size=(64, 80)), shapes_root)


def select_classes(shapes: Path, folder: Path, names: Sequence[str]) -> list[str]:
    """The set with these classes alone, in this order and with ids of their own."""
    folder.mkdir()
    overrides = ["data=custom"]
    for split in ("train", "val"):
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        new_ids = {
            category["id"]: 100 + names.index(category["name"])
            for category in content["categories"]
            if category["name"] in names
        }
        content["categories"] = [{"id": 100 + i, "name": name} for i, name in enumerate(names)]
        content["annotations"] = [
            annotation | {"category_id": new_ids[annotation["category_id"]]}
            for annotation in content["annotations"]
            if annotation["category_id"] in new_ids
        ]
        file = folder / f"{split}.json"
        file.write_text(json.dumps(content))
        overrides += [
            f"data.{split}.images={shapes / 'images' / split}",
            f"data.{split}.annotations={file}",
        ]
    return overrides


@pytest.fixture(scope="module")
def source(
    compose_config: Callable[..., Any],
    tiny_model: list[str],
    shapes: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint that knows three classes."""
    folder = tmp_path_factory.mktemp("source")
    data = select_classes(shapes, folder / "data", ["circle", "ring", "triangle"])
    overrides = [*tiny_model, *data, "trainer.steps=3", f"run_dir={folder / 'run'}"]
    train(compose_config("train", overrides))
    return folder / "run" / "checkpoints" / "best.pt"


@pytest.fixture
def finetune(
    compose_config: Callable[..., Any], tiny_model: list[str], shapes: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Two steps on other classes; gives the run folder."""

    def finetune(*overrides: str) -> Path:
        data = select_classes(shapes, tmp_path / "data", ["square", "triangle", "circle", "star"])
        common = [word for word in tiny_model if not word.startswith("model.")]
        run_dir = f"run_dir={tmp_path / 'run'}"
        choices = ["experiment=finetune", "trainer.steps=2", *common, *data, run_dir, *overrides]
        train(compose_config("train", choices))
        return tmp_path / "run"

    return finetune


def test_a_checkpoint_goes_on_with_other_classes(finetune: Callable[..., Path], source: Path):
    # Decay changes every kernel that is trained, however small its gradient.
    options = ["optimizer.lr=0.1", "optimizer.weight_decay=0.1", "trainer.ema_decay=null"]
    folder = finetune(f"model.weights={source}", *options)
    log = (folder / "train.log").read_text()
    assert "classes it keeps (2): triangle, circle" in log
    assert "classes that start anew (2): square, star" in log
    assert "classes of it that the data lacks (1): ring" in log

    before, after = load_checkpoint(source), load_checkpoint(folder / "checkpoints" / "last.pt")
    assert [name for _, name in after["categories"]] == ["square", "triangle", "circle", "star"]
    old, new = before["config"]["model"], after["config"]["model"]
    assert new["backbone"] == old["backbone"] | {"frozen_stages": 2, "freeze_batch_norm": True}
    for key in ("input_size", "extras", "head", "criterion", "postprocess"):
        assert new[key] == old[key]
    num_frozen = 0
    for name, tensor in after["model"].items():
        # Blocks 1 and 2 end at stride 4.
        in_stages = name.startswith(
            ("backbone.stem.", *(f"backbone.blocks.{i}." for i in range(3)))
        )
        if in_stages or (name.startswith("backbone.") and ".norm." in name):
            assert tensor.equal(before["ema"][name]), name
            num_frozen += tensor.numel() if name.endswith((".weight", ".bias")) else 0
        elif name.endswith("pointwise.conv.weight"):
            assert not tensor.equal(before["ema"][name]), name
    assert f"{num_frozen:,} of the parameters are frozen" in log


def test_a_model_can_be_chosen(finetune: Callable[..., Path], source: Path, tiny_model: list[str]):
    """As weights need it that name none."""
    model = ["model=ssd300_mobilenet_v1", *(word for word in tiny_model if word[:6] == "model.")]
    folder = finetune(f"model.weights={source}", *model)
    assert "classes it keeps (2): triangle, circle" in (folder / "train.log").read_text()
    model = load_checkpoint(folder / "checkpoints" / "last.pt")["config"]["model"]
    assert model["backbone"]["frozen_stages"] == 2


def test_keys_of_the_model_are_laid_over(finetune: Callable[..., Path], source: Path):
    folder = finetune(
        f"model.weights={source}", "+model.criterion.alpha=0.5", "model.backbone.frozen_stages=0"
    )
    model = load_checkpoint(folder / "checkpoints" / "last.pt")["config"]["model"]
    assert model["criterion"]["alpha"] == 0.5 and model["backbone"]["frozen_stages"] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "give model.weights=FILE"),
        (["model.weights=absent.pt"], "absent.pt: no such checkpoint file"),
        (["model.weights=torchvision:NAME"], "names no model: give model=retinanet as well"),
        (["model.weights=absent.pt", "+model.width=0.5"], "model.width is fixed .*: leave it out"),
        (
            ["model.weights=absent.pt", "+model.num_experts=4"],
            r"model.num_experts is fixed .*: give \+model.backbone.num_experts=",
        ),
    ],
)
def test_mistakes(finetune: Callable[..., Path], overrides: list[str], words: str):
    with pytest.raises(UserError, match=words):
        finetune(*overrides)


def test_a_file_that_is_no_checkpoint(finetune: Callable[..., Path], tmp_path: Path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="no checkpoint of this project"):
        finetune(f"model.weights={tmp_path / 'file.pt'}")
