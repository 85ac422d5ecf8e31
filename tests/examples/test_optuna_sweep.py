from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from detection.engine.state import TrainState
from detection.engine.train import take_step
from detection.errors import UserError

pytest.importorskip("optuna")
from examples.optuna_sweep import main, search


def test_trials_are_runs_and_the_best_is_known(
    tiny_model: list[str], tiny_data: list[str], tmp_path: Path
):
    overrides = [*tiny_model, *tiny_data, "trainer.steps=1"]
    for total in (1, 2):  # the second adds to the first
        study = search(num_trials=1, output=tmp_path, overrides=overrides)
        assert len(study.trials) == total
    found = [json.loads((tmp_path / name / "metrics.json").read_text())["AP"] for name in "01"]
    assert [trial.value for trial in study.trials] == found
    assert study.best_value == max(found)
    rates = {trial.params["optimizer.lr"] for trial in study.trials}
    assert len(rates) == 2
    for trial in study.trials:
        config = (tmp_path / str(trial.number) / "config.yaml").read_text()
        assert f"lr: {trial.params['optimizer.lr']}" in config


def test_a_trial_that_fails_ends_no_search(
    tiny_model: list[str], tiny_data: list[str], tmp_path: Path
):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.yaml").write_text("")  # a run lies there already
    overrides = [*tiny_model, *tiny_data, "trainer.steps=1"]
    study = search(num_trials=2, output=tmp_path, overrides=overrides)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("stopped_at", [1, 3], ids=["at once", "after an evaluation"])
def test_a_signal_ends_the_search(
    tiny_model: list[str],
    tiny_data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopped_at: int,
):
    """The trial that it stops is not complete, also where its run has an AP by then."""

    def take_step_and_signal(state: TrainState, *rest: Any) -> Any:
        if state.step == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(state, *rest)

    monkeypatch.setattr("detection.engine.train.take_step", take_step_and_signal)
    overrides = [*tiny_model, *tiny_data, "trainer.steps=9", "trainer.evaluate_every=2"]
    study = search(num_trials=3, output=tmp_path, overrides=overrides)
    assert [trial.state.name for trial in study.trials] == ["FAIL"]
    assert (tmp_path / "0" / "metrics.json").exists() == (stopped_at == 3)

    monkeypatch.setattr(sys, "argv", ["optuna_sweep.py", "--trials=0", f"--output={tmp_path}"])
    with pytest.raises(SystemExit):  # there is no best
        main()
    assert "error: no trial of" in capsys.readouterr().err


def test_a_wrong_override_starts_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean"):
        search(num_trials=2, output=tmp_path / "out", overrides=["trainer.stepz=1"])
    assert not (tmp_path / "out").exists()
