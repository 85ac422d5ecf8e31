from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from detection.augmentation import Augmentation
from detection.config import plain
from detection.engine.settings import EvaluationSettings, TrainerSettings, read_section
from detection.errors import UserError


def test_defaults_are_those_of_the_configs(compose_config: Callable[..., Any]):
    content = plain(compose_config("train", []))
    trainer = content["trainer"]
    needed = {key: trainer[key] for key in ("steps", "batch_size")}
    assert asdict(TrainerSettings(**needed)) == trainer
    assert asdict(EvaluationSettings()) == content["evaluation"]
    assert asdict(Augmentation()) == content["data"]["augmentation"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rotate": 10}, r"^data\.augmentation\.rotate: Key 'rotate' not in"),
        ({"crop_areas": None}, r"^data\.augmentation\.crop_areas: .*not Optional"),
        ({"max_boxes": 2.5}, r"^data\.augmentation\.max_boxes: Value '2\.5' .* Integer$"),
        ({"max_boxes": 0}, r"^data\.augmentation\.max_boxes=0: it is at least 1$"),
        ({"crop": "random"}, r'^data\.augmentation\.crop=random: it is "ssd" or "none"$'),
        ({"horizontal_flip": 1.5}, r"^data\.augmentation\.horizontal_flip=1\.5: it is a prob"),
        ({"mosaic": -0.1}, r"^data\.augmentation\.mosaic=-0\.1: it is a probability, 0 to 1$"),
        ({"crop_areas": [0.5]}, r"^data\.augmentation\.crop_areas=\[0\.5\]: it is \[least,most\]"),
        ({"crop_aspect_ratios": [2.0, 0.5]}, r"^data\.augmentation\.crop_aspect_ratios=\[2\.0, 0"),
        ({"multi_scale": 96}, r"^data\.augmentation\.multi_scale: "),
        ({"multi_scale": [96, 224]}, r"^data\.augmentation\.multi_scale=\[96, 224\]: it is null"),
        ({"multi_scale": [96, 224, 0]}, r"multi_scale=\[96, 224, 0\]: .* a step from 1 on$"),
        ({"on_device": 0.5}, r"^data\.augmentation\.on_device=0\.5: it is null, or the size"),
    ],
)
def test_mistakes_in_the_augmentation(config: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read_section(Augmentation, "data.augmentation", config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 0}, r"^evaluation\.batch_size=0: give at least 1$"),
        ({"num_workers": -1}, r"^evaluation\.num_workers=-1: give at least 0$"),
        ({"num_pictures": 2.5}, r"^evaluation\.num_pictures: Value '2\.5'"),
        ({"picture_score_threshold": 2}, r"picture_score_threshold=2\.0: give one from 0 to 1$"),
        ({"foo": 1}, r"^evaluation\.foo: Key 'foo' not in"),
    ],
)
def test_mistakes_in_the_evaluation(config: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read_section(EvaluationSettings, "evaluation", config)
