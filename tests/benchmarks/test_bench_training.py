from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_training import (
    COMMON,
    KEEPING,
    OURS,
    PARTS,
    QUICK,
    THEIRS,
    describe,
    main,
    make_ours,
    make_theirs,
    read_setting,
)


def test_a_step_of_both_sides(tiny_data: list[str]):
    here = ("trainer.num_workers=0", "trainer.device=cpu")
    setting = read_setting([*COMMON, *QUICK, *tiny_data, *here])
    theirs = make_theirs(setting)
    ours, profile = make_ours(setting)
    assert ours() > 0 and theirs() > 0
    found = profile(1)
    assert tuple(found) == PARTS and min(found.values()) > 0


@pytest.mark.slow
def test_both_sides_train(tiny_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "found.json"
    options = ["--quick", "--rounds", "2", "--steps", "1", "--output", str(output)]
    main([*options, *tiny_data, "trainer.num_workers=0", "trainer.device=cpu"])
    found = json.loads(output.read_text())
    for side in (OURS, THEIRS, KEEPING):
        assert len(found["seconds"][side]) == 2 and min(found["seconds"][side]) > 0
        assert found["memory"][side] > 50
    assert tuple(found["profile"]) == PARTS and min(found["profile"].values()) > 0
    assert "times as fast" in capsys.readouterr().out


def test_the_report():
    """By hand: 2 against 3 seconds and 1 against 2."""
    found = {
        "seconds": {"ours": [2.0, 1.0], "torchvision": [3.0, 2.0]},
        "memory": {"ours": 100.0, "torchvision": 400.0},
        "profile": {"loading": 0.5, "forward": 1.5},
    }
    printed = describe(found, batch_size=16)
    ratio = "ours is 1.75 times as fast as torchvision (1.50 to 2.00) and takes 0.25 of its memory"
    assert ratio in printed
    assert "loading               500.0 ms  25.0 %" in printed
    assert "ours                        0.667      10.7   0.500..1.000       100" in printed
