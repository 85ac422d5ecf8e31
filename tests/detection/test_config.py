from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf

from detection.config import config_dir, find_data, plain
from detection.errors import UserError

CONFIGS = config_dir()


def options(group: str) -> list[str]:
    folder = CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


MODELS, DATA = ([o for o in options(g) if "/" not in o] for g in ("model", "data"))


@pytest.mark.parametrize(("model", "data"), list(itertools.product(MODELS, DATA)))
def test_every_model_composes_with_every_data(
    compose_config: Callable[..., Any], model: str, data: str
):
    content = plain(compose_config("train", [f"model={model}", f"data={data}"]))
    assert content["model"]["_target_"].startswith("detection.models.")
    assert content["data"]["_target_"] == f"detection.data.sources.{data}"
    assert content["trainer"]["steps"] > 0


@pytest.mark.parametrize(
    "group", ["experiment", "optimizer", "schedule", "trainer", "evaluation", "logger"]
)
def test_every_option_composes(compose_config: Callable[..., Any], group: str):
    assert options(group)
    for option in options(group):
        content = plain(compose_config("train", [f"{group}={option}"]))
        assert content["model" if group == "experiment" else group]


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match=r"model\.width"):
        plain(OmegaConf.create({"model": {"width": "???"}}))


@pytest.mark.parametrize(
    "change",
    [
        {"_target_": "os.system"},
        {"root": {"_target_": "os.system"}},
        {"root": "${oc.create:{_target_:pathlib.Path}}"},
    ],
)
def test_a_checkpoint_names_no_other_source_of_data(change: dict[str, Any]):
    data = {"_target_": "detection.data.sources.coco", "root": "x", "augmentation": {}}
    assert find_data({"data": None}, {"config": {"data": data}}) == data
    with pytest.raises(UserError, match="allowed are detection"):
        find_data({"data": None}, {"config": {"data": data | change}})
    assert find_data({"data": change}, {"config": {"data": data}}) == change
