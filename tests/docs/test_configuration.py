from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from detection.config import plain

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    write_page = runpy.run_path(str(DOCS / "configuration.py"))["write_page"]
    assert write_page() == PAGE, "run python docs/configuration.py"


def flatten(content: Any, prefix: str = "") -> set[str]:
    if not isinstance(content, dict) or not content:
        return {prefix}
    return {name for key, value in content.items()
            for name in flatten(value, f"{prefix}.{key}".strip("."))}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("train", []),
        ("train", ["model=retinanet", "data=coco", "optimizer=sgd", "schedule=constant"]),
        ("eval", ["data=custom"]),
        ("visualize", []),
        ("export", []),
    ],
)
def test_every_key_of_a_composed_config_is_on_the_page(
    compose_config: Callable[..., DictConfig], name: str, overrides: list[str]
) -> None:
    shown = set(re.findall(r"^\| `([\w.]+)` \|", PAGE, flags=re.MULTILINE))
    keys = flatten(plain(compose_config(name, overrides)))
    assert keys - shown - {"experiment", "logger", "data"} == set()
