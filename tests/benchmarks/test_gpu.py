from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import list_rows, main, project


def test_it_runs_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--quick", "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    printed = capsys.readouterr().out
    measured = json.loads((tmp_path / "gpu.json").read_text())
    assert len(measured["training"]) == len(list_rows(quick=True)) == 6
    assert all(row["images_per_second"] > 0 for row in measured["training"])
    for name in ("SSD300 static", "SSD300 CondConv"):
        assert measured["latency_ms"][name][0] > 0
        assert f"{name}: 20.5M images at" in printed
    assert "left out" not in printed


def test_what_there_is_no_time_for_is_named(capsys: pytest.CaptureFixture[str]):
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
