from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.augmentation import Augmentation
from detection.data.coco import CocoIndex
from detection.data.dataset import collate
from detection.data.sources import load_split, shapes
from detection.data.transforms import EvalTransform, TrainTransform
from detection.engine.inputs import TrainingInputs
from detection.engine.run_folder import RunFolder
from detection.errors import UserError
from detection.losses import FocalCriterion
from detection.models.ssd import SSD
from detection.preprocess import Preprocess

CPU = torch.device("cpu")
KEY = "data.augmentation"
OPTIONS = {
    "mixing": [f"{KEY}.mosaic=0.5", f"{KEY}.mixup=0.5"],
    "multi-scale": [f"{KEY}.multi_scale=[48,96,16]"],
    "device": [f"{KEY}.on_device=1.5", f"{KEY}.photometric=0.5", f"{KEY}.zoom_out=0.3"],
}
ALL = [option for options in OPTIONS.values() for option in options]


@pytest.fixture
def index(shapes_root: Path) -> CocoIndex:
    return load_split(shapes(root=shapes_root, num_train=10, num_val=5, image_size=(64, 80)).train)


def make_inputs(index: CocoIndex, **options: Any) -> TrainingInputs:
    return TrainingInputs(index, Preprocess(input_size=64), Augmentation(**options), seed=0)


@pytest.mark.parametrize("on_device", [None, 1.5])
def test_the_loader_holds_nothing_of_the_device(index: CocoIndex, on_device: float | None):
    preprocess = Preprocess(input_size=64)
    inputs = TrainingInputs(index, preprocess, Augmentation(on_device=on_device), seed=0)
    for module in filter(None, (preprocess, inputs.on_device)):
        module.to("meta")
    sent = pickle.dumps(inputs.dataset)
    assert b"_rebuild_tensor" in sent and b"_rebuild_meta_tensor" not in sent


def read_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(folder).read_metrics() if line["kind"] == "train"]


@pytest.mark.parametrize("options", OPTIONS)
def test_resumed_equals_uninterrupted_whatever_the_workers(
    run: Callable[..., Path], options: str, assert_equal_weights: Callable[[Path, Path], None]
):
    common = (*OPTIONS[options], "trainer.evaluate_every=3", "schedule.steps=6")
    common += ("trainer.checkpoint_every=2", "trainer.channels_last=true")
    whole = run(*common, "trainer.steps=6", name="whole")
    run(*common, "trainer.steps=4", "trainer.num_workers=1", name="parts")
    parts = run("resume=true", "trainer.steps=6", "trainer.num_workers=2", name="parts")
    assert_equal_weights(whole, parts)
    plain = run(*common[len(OPTIONS[options]) :], "trainer.steps=6", name="plain")
    with pytest.raises(AssertionError):
        assert_equal_weights(whole, plain)


def test_micro_batches_change_nothing_but_rounding(run: Callable[..., Path]):
    common = (*ALL, "trainer.steps=3", "trainer.freeze_batch_norm=true")
    whole, cut = run(*common, name="1"), run(*common, "trainer.num_micro_batches=2", name="2")
    assert read_losses(cut) == pytest.approx(read_losses(whole), rel=1e-5)


def test_each_step_has_the_input_size_that_was_drawn_for_it(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """In all micro-batches; an evaluation has the model's."""
    trained, evaluated = [], []
    forward = SSD.forward

    def recorded(self: SSD, images: torch.Tensor) -> Any:
        (trained if self.training else evaluated).append(images.shape[-1])
        return forward(self, images)

    monkeypatch.setattr(SSD, "forward", recorded)
    run(*OPTIONS["multi-scale"], "trainer.steps=8", "trainer.num_micro_batches=2")
    assert trained[::2] == trained[1::2] and len(trained) == 16
    assert {*trained} <= {48, 64, 80, 96} and len({*trained}) > 1
    assert {*evaluated} == {64}


def test_the_loss_is_of_the_boxes_in_the_pixels_of_the_step(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    seen = []
    forward = FocalCriterion.forward

    def recorded(self: FocalCriterion, predictions: Any, targets: Any) -> Any:
        seen.append(targets.boxes)
        return forward(self, predictions, targets)

    monkeypatch.setattr(FocalCriterion, "forward", recorded)
    run("trainer.steps=1", name="plain")
    plain = seen[0]
    seen.clear()
    run("trainer.steps=1", f"{KEY}.multi_scale=[96,96,1]", name="scaled")
    assert plain.any() and seen[0].equal(plain * 1.5)


def test_sizes_are_drawn_evenly_and_from_seed_and_step(index: CocoIndex):
    inputs = make_inputs(index, multi_scale=[48, 100, 16])
    assert inputs.input_sizes == [48, 64, 80, 96]
    drawn = [inputs.draw_size(step) for step in range(800)]
    assert drawn == [make_inputs(index, multi_scale=[48, 100, 16]).draw_size(s) for s in range(800)]
    assert all(150 < count < 250 for count in Counter(drawn).values()) and len({*drawn}) == 4
    inputs.seed = 1
    assert drawn != [inputs.draw_size(step) for step in range(800)]


def test_without_options_a_batch_is_as_loaded(index: CocoIndex):
    inputs = make_inputs(index)
    assert isinstance(inputs.dataset.transform, TrainTransform) and inputs.on_device is None
    batch = collate([inputs.dataset[0, i] for i in range(4)])
    assert batch.draws is None
    images, targets = inputs.to_device(batch, 7, CPU)
    assert images is batch.images and all(
        a is b for a, b in zip(targets, batch.targets, strict=True)
    )


def test_a_batch_is_resized_to_the_size_of_its_step(index: CocoIndex):
    inputs = make_inputs(index, multi_scale=[96, 96, 32])
    batch = collate([inputs.dataset[0, i] for i in range(4)])
    images, targets = inputs.to_device(batch, 0, CPU)
    assert images.shape == (4, 3, 96, 96)
    assert targets.boxes.equal(batch.targets.boxes * 1.5)


def test_on_the_device_the_loader_only_resizes(index: CocoIndex):
    inputs = make_inputs(index, on_device=1.5, photometric=1.0, multi_scale=[80, 80, 1])
    assert isinstance(inputs.dataset.transform, EvalTransform)
    samples = [inputs.dataset[0, i] for i in range(4)]
    batch = collate(samples)
    assert batch.images.shape == (4, 3, 96, 96)
    images, _ = inputs.to_device(batch, 0, CPU)
    assert images.shape == (4, 3, 80, 80) and images.is_floating_point()
    # An item's outcome is that of its own draws, wherever it stands.
    turned, _ = inputs.to_device(collate(samples[::-1]), 5, CPU)
    torch.testing.assert_close(turned.flip(0), images, atol=1e-3, rtol=0)
    # Boxes are counted after the crop.
    assert inputs.dataset.mixing.max_boxes is None


def test_a_backbone_that_cannot_take_a_size(run: Callable[..., Path], tmp_path: Path):
    options = ["model/backbone=timm", "model.backbone.name=vit_tiny_patch16_224"]
    options += ["model.backbone.strides=[16]", "model.num_experts=1"]
    options += ["model.input_size=224"]
    with pytest.raises(UserError, match=r"augmentation\.multi_scale: .* 200 x 200: .*; give other"):
        run(*options, "trainer.steps=1", f"{KEY}.multi_scale=[200,200,1]")
    assert not (tmp_path / "run").exists()
