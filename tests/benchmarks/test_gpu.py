from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import gpu
from benchmarks.gpu import list_rows, main, project
from detection.data.dataset import Batch
from detection.engine.state import TrainState
from detection.engine.train import take_step

QUICK = list_rows(quick=True)


@pytest.mark.parametrize(
    "rows",
    # A compiled one takes as long as all the others.
    [QUICK[:2], pytest.param(QUICK, marks=pytest.mark.slow)],
    ids=["one network, eager", "all"],
)
def test_it_runs_without_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: list[gpu.Row],
):
    assert len(QUICK) == 6
    monkeypatch.setattr(gpu, "list_rows", lambda quick: rows)
    main(["--quick", "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "gpu.json").read_text())
    assert len(measured["training"]) == len(rows)
    assert all(row["images_per_second"] > 0 for row in measured["training"])
    for name in ("SSD300 static", "SSD300 CondConv"):
        assert measured["latency_ms"][name][0] > 0
    for row in rows:
        assert f"{row.name}, {row.kind}: 20.5M images at" in printed
    assert "left out" not in printed


def test_a_row_that_fails_says_why_and_the_rest_is_kept(
    tiny_data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The engine's step is what is timed; the file is whole after each row."""
    output = tmp_path / "gpu.json"
    written: list[int] = []

    def fail(state: TrainState, network: nn.Module, batches: list[Batch], *rest: Any) -> Any:
        written.append(len(json.loads(output.read_text())["training"]))
        if len(written) == 1:
            raise RuntimeError("CUDA error: no luck\nand more")
        return take_step(state, network, batches, *rest)

    monkeypatch.setattr(gpu, "list_rows", lambda quick: 2 * QUICK[:1])
    monkeypatch.setattr(gpu, "measure_latency", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(gpu, "draw_images", lambda *_, **__: tiny_data)
    monkeypatch.setattr(gpu, "take_step", fail)
    main(["--quick", "--device", "cpu", "--output", str(output)])
    first, second = json.loads(output.read_text())["training"]
    assert first["images_per_second"] is None
    assert first["failure"] == "RuntimeError CUDA error: no luck"
    assert "| RuntimeError CUDA error: no luck |" in capsys.readouterr().out
    assert second["images_per_second"] > 0
    assert set(written) == {0, 1}


def test_no_compilation_starts_that_may_not_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """After a first of two minutes there is no time for another."""
    now = 0.0

    def measure(row: gpu.Row, *_: Any) -> gpu.Speed:
        nonlocal now
        now += 200 if row.compiled else 1
        return gpu.Speed(1.0, 0.0)

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(gpu, "measure_training", measure)
    monkeypatch.setattr(gpu, "measure_latency", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(gpu, "draw_images", lambda *_, **__: [])
    main(["--device", "cpu", "--minutes", "7"])
    printed = capsys.readouterr().out
    assert printed.count("| compiled, synthetic | 1 |") == 1
    assert printed.count("left out, the minutes are over: ") == 7


def test_what_there_is_no_time_for_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu, "measure_latency", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(gpu, "draw_images", lambda *_, **__: [])
    main(["--quick", "--device", "cpu", "--minutes", "0"])
    assert capsys.readouterr().out.count("left out, the minutes are over: SSD300") == 6


def test_the_projection():
    """By hand: 20,480,000 images at 5,689 a second are an hour."""
    assert project({"a": 20_480_000 / 3600}) == [
        "a: 20.5M images at 5,689 images/s take 1.00 hours"
    ]


def test_the_rows_of_the_table():
    rows = list_rows(quick=False)
    asked = {
        (name, batch, compiled)
        for name in ("SSD300 static", "SSD300 CondConv")
        for batch in (128, 256, 512, 1024)
        for compiled in (False, True)
    }
    assert asked <= {(row.name, row.batch_size, row.compiled) for row in rows if not row.cached}
    assert {row.name for row in rows if row.cached} == {"SSD300 static", "SSD300 CondConv"}
    assert any(row.name.startswith("RetinaNet") for row in rows)
