from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.model_table import MODELS, make_table
from detection.config import config_dir

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def read_table() -> list[str]:
    table = PAGE[PAGE.index("| overrides |") :]
    return table[: table.index("\n\n")].splitlines()


@pytest.mark.slow
def test_the_page_has_the_scripts_table():
    assert read_table() == make_table().splitlines()


def test_the_page_has_every_model():
    _, _, *rows = read_table()
    assert [row.split("`")[1] for row in rows] == list(MODELS)
    assert set(make_table(MODELS[:2]).splitlines()) <= set(read_table())


def test_every_shipped_model_is_shown():
    for path in (config_dir() / "model").glob("*.yaml"):
        assert any(overrides.startswith(f"model={path.stem}") for overrides in MODELS)
    for path in (config_dir() / "model" / "backbone").glob("*.yaml"):
        shown = [o for o in MODELS if f"model/backbone={path.stem}" in o.split()]
        default = path.stem in ("mobilenet_v1", "resnet50")
        assert shown or default
