"""docs/benchmarks.md lists every benchmark."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_every_benchmark_is_listed():
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(re.findall(r"benchmarks/(\w+\.py)", PAGE)) == scripts
