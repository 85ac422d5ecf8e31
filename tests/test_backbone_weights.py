"""Training from ImageNet weights of the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from condconv.backbones import MobileNetV1
from detection.checkpoint import load_checkpoint
from detection.errors import UserError
from detection.importers.timm import BLOCK, STEM

STILL = "optimizer.lr=1e-9"  # next to no learning rate: the weights stay as they were loaded


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """A narrow backbone's weights under timm's names."""
    layers = {ours: theirs for theirs, ours in STEM.items()}
    for number in range(13):
        for theirs, ours in BLOCK.items():
            layers[f"blocks.{number}.layers.{ours}"] = f"blocks.0.{number}.{theirs}"
    weights = {}
    for name, tensor in MobileNetV1(width=0.25).state_dict().items():
        layer, _, parameter = name.rpartition(".")
        weights[f"{layers[layer]}.{parameter}"] = tensor
    torch.save(weights, tmp_path / "mobilenetv1_025.pth")
    return tmp_path / "mobilenetv1_025.pth"


def load_kernels(folder: Path, num_experts: int) -> tuple[Tensor, Tensor]:
    """The first and the last kernel of the backbone, experts mixed as at the start."""
    model = load_checkpoint(folder / "checkpoints" / "last.pt")["model"]
    last = model["backbone.blocks.12.layers.pointwise.conv.weight"]
    if num_experts > 1:
        last = last.sum(0) / math.sqrt(num_experts)
    return model["backbone.stem.conv.weight"], last


@pytest.mark.parametrize("num_experts", [1, 2])
def test_a_run_starts_from_them(run: Callable[..., Path], weights_file: Path, num_experts: int):
    weights = torch.load(weights_file)
    expected = weights["conv_stem.weight"], weights["blocks.0.12.conv_pw.weight"]
    model = f"model.num_experts={num_experts}"
    folder = run("trainer.steps=1", STILL, f"backbone_weights={weights_file}", model)
    torch.testing.assert_close(load_kernels(folder, num_experts), expected)
    assert f"the backbone starts from {weights_file}" in (folder / "train.log").read_text()

    weights_file.unlink()
    run("resume=true", "trainer.steps=2", STILL, model)
    torch.testing.assert_close(load_kernels(folder, num_experts), expected)


def test_without_them_it_starts_anew(run: Callable[..., Path], weights_file: Path):
    """So the test above can fail."""
    first, _ = load_kernels(run("trainer.steps=1", STILL), num_experts=2)
    assert not first.allclose(torch.load(weights_file)["conv_stem.weight"], atol=1e-3)


def test_weights_that_do_not_fit_stop_before_the_run_folder(
    run: Callable[..., Path], weights_file: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="another model"):
        run(f"backbone_weights={weights_file}", "model.width=0.5")
    with pytest.raises(UserError, match="absent"):
        run(f"backbone_weights={tmp_path / 'absent.npz'}")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_a_detector_is_told_apart(run: Callable[..., Path], trained: Path):
    with pytest.raises(UserError, match=r"a checkpoint of a whole detector: give model\.weights="):
        run("trainer.steps=1", f"backbone_weights={trained / 'checkpoints' / 'best.pt'}")
