from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from detection.data import sources
from detection.data.shapes import Recipe
from detection.data.sources import SplitFiles, load_split
from detection.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
UNSET = {"images": None, "annotations": None, "ids": None}


def error_line(function: Any, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(**arguments)
    (line,) = str(caught.value).splitlines()
    return line


def read_config(name: str) -> dict[str, Any]:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config.pop("_target_") == f"detection.data.sources.{name}"
    assert config.pop("defaults") == [{"augmentation": "ssd"}, "_self_"]
    return config


def test_coco(tmp_path: Path):
    config = {**read_config("coco"), "root": tmp_path}
    config["val"]["ids"] = "minival.txt"
    splits = sources.coco(**config)
    annotations = tmp_path / "annotations"
    assert splits.train == SplitFiles(
        tmp_path / "train2017", annotations / "instances_train2017.json"
    )
    assert splits.val == SplitFiles(
        tmp_path / "val2017", annotations / "instances_val2017.json", Path("minival.txt")
    )
    assert "instances_train2017.json: no such file" in error_line(load_split, files=splits.train)


def test_coco_without_root(tmp_path: Path):
    config = read_config("coco")
    line = error_line(sources.coco, **config)
    assert line.startswith("data.root is not set") and "train2017/, val2017/" in line
    config["root"] = tmp_path / "none"
    assert error_line(sources.coco, **config).startswith(f"data.root={tmp_path}")


def test_custom():
    train = {"images": "a", "annotations": "b.json", "ids": None}
    val = {"images": "c", "annotations": "d.json", "ids": "e.txt"}
    splits = sources.custom(train=train, val=val)
    assert splits.train == SplitFiles(Path("a"), Path("b.json"))
    assert splits.val == SplitFiles(Path("c"), Path("d.json"), Path("e.txt"))


def test_custom_without_training():
    splits = sources.custom(train=UNSET, val={"images": "c", "annotations": "d.json"})
    assert splits.train is None
    assert error_line(load_split, files=splits.train).startswith("data.train is not set")


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("key", ["images", "annotations"])
def test_custom_with_half_a_split(name: str, key: str):
    whole = {"images": "a", "annotations": "b.json", "ids": None}
    config = {**read_config("custom"), "train": whole, "val": whole}
    config[name] = {**whole, key: None}
    assert error_line(sources.custom, **config).startswith(f"data.{name}.{key} is not set")


def test_shapes_config_states_the_default_recipe():
    config = read_config("shapes")
    assert config.pop("root") is None
    assert config == json.loads(json.dumps(asdict(Recipe())))


def test_shapes(tmp_path: Path):
    config = OmegaConf.create(read_config("shapes"))
    config.update(root=str(tmp_path), num_train=3, num_val=2)
    splits = sources.shapes(**config)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert splits.train is not None
    assert len(load_split(splits.train)) == 3 and len(load_split(splits.val)) == 2
