from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.condconv_vs_static import (
    T_QUANTILES,
    Run,
    describe,
    main,
    measure_training,
    summarize,
)
from detection.engine.run_folder import RunFolder


def test_summary():
    """By hand: mean 3, squared deviations 4 + 1 + 0 + 1 + 4, t(4) = 2.776."""
    summary = summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    deviation = math.sqrt(10 / 4)
    half = 2.776 * deviation / math.sqrt(5)
    assert summary == pytest.approx((3.0, deviation, 3 - half, 3 + half))
    assert summarize([0.25, 0.25]) == (0.25, 0.0, 0.25, 0.25)


@pytest.mark.parametrize("count", [31, 40])
def test_summary_of_many(count: int):
    summary = summarize([0.0, 1.0] * (count // 2) + [0.5] * (count % 2))
    half = 2.042 * summary.deviation / math.sqrt(count)
    assert (summary.low, summary.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_quantiles():
    """The density of Student's t, integrated: 2.5 % lie above each."""
    assert len(T_QUANTILES) == 30
    for freedom, quantile in enumerate(T_QUANTILES, start=1):
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        x = torch.linspace(0, quantile, 10001, dtype=torch.float64)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        inside = scale / math.sqrt(freedom * math.pi) * torch.trapezoid(density, x)
        assert float(inside) == pytest.approx(0.475, abs=1e-4)


def test_training_time_leaves_evaluations_out():
    lines = [
        {"kind": "train", "step": 20, "images_per_second": 40.0},
        {"kind": "evaluation", "step": 20},
        {"kind": "train", "step": 30, "images_per_second": 10.0},
    ]
    assert measure_training(lines, batch_size=8) == 20 * 8 / 40 + 10 * 8 / 10


def test_table():
    static = [Run(0.50, 10.0, 100_000_000), Run(0.60, 10.0, 100_000_000)]
    condconv = [Run(0.54, 14.0, 103_000_000), Run(0.62, 12.0, 103_000_000)]
    table = describe(static, condconv, [3, 7], 4)
    assert "| static | 100.0M | 0.5500 | 0.0707 | 10 |" in table
    assert "| CondConv, 4 experts | 103.0M | 0.5800 | 0.0566 | 13 |" in table
    assert "| paired difference | +3.0% | +0.0300 | 0.0141 | +30% |" in table
    # 12.706 * 0.0141 / sqrt(2)
    assert "-0.0971 to +0.1571" in table
    assert "| 7 | 0.6000 | 0.6200 | +0.0200 |" in table


@pytest.mark.slow
def test_pairs_are_trained_and_taken_up_again(
    tiny_model: list[str], tiny_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--seeds", "0,1", "--num-experts", "2", "--output", str(tmp_path / "runs")]
    arguments += [word for word in tiny_model if not word.startswith("model.num_experts")]
    arguments += [*tiny_data, "trainer.steps=2", "evaluation.num_pictures=0"]
    arguments += ["trainer.checkpoint_every=1"]
    main(arguments)
    table = capsys.readouterr().out.rpartition("| network")[2]
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert folders == {f"{n}_experts_seed_{seed}" for n in (1, 2) for seed in (0, 1)}

    # One run as if killed before its first checkpoint: it alone is trained again.
    killed = tmp_path / "runs" / "2_experts_seed_1"
    for name in ("last.pt", "best.pt"):
        (killed / "checkpoints" / name).unlink()
    # Another as if killed after its first step.
    stopped = tmp_path / "runs" / "1_experts_seed_0"
    checkpoints = stopped / "checkpoints"
    (checkpoints / "best.pt").unlink()
    (checkpoints / "step_00000001.pt").replace(checkpoints / "last.pt")
    capsys.readouterr()
    main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("run folder") == 2
    for folder in (killed, stopped):
        assert [line["step"] for line in RunFolder(folder).read_metrics()] == [1, 2, 2]
    # Times differ, AP does not.
    assert printed.rpartition("| seed")[2] == table.rpartition("| seed")[2]

    with pytest.raises(SystemExit) as info:
        main([*arguments, "optimizer.lr=0.02"])
    assert info.value.code == 1
    assert "other optimizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--seeds", "1"], ["--seeds", "1,1"], ["--num-experts", "1"]]
)
def test_no_pair_no_comparison(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "give" in capsys.readouterr().err
