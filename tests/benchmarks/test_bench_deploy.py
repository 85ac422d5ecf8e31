from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_deploy


@pytest.mark.slow
def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    arguments = ["--quick", "--rows", "SSD300 0.5x", "--threads", "1", "--output", str(output)]
    assert bench_deploy.main([*arguments, "--sides", "eager", "onnxruntime"]) == 0
    assert "SSD300 0.5x, onnxruntime, batch 1: 8 experts take" in capsys.readouterr().out
    results = json.loads(output.read_text())
    assert [result["network"] for result in results if "ratio" in result] == ["8 experts"] * 2


@pytest.mark.parametrize(
    ("side", "ratio", "options", "status"),
    [
        ("onnxruntime", 1.11, [], 1),
        ("onnxruntime", 1.09, [], 0),
        ("onnxruntime", 1.11, ["--quick"], 0),
        ("eager", 1.11, [], 0),
    ],
)
def test_the_exit_status_tells_whether_the_ratio_is_met(
    side: str, ratio: float, options: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(row: str, *_: Any) -> list[dict[str, Any]]:
        return [{"row": row, "side": side}, {"row": row, "side": side, "ratio": ratio}]

    monkeypatch.setattr(bench_deploy, "bench", bench)
    threads = ["--threads", "1"]
    assert bench_deploy.main(["--rows", "RetinaNet-lite", *threads, *options]) == status
