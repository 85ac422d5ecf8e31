from __future__ import annotations

import json
from pathlib import Path

import pytest

from detection.errors import UserError

pytest.importorskip("optuna")
from examples.optuna_sweep import search


def test_trials_are_runs_and_the_best_is_known(
    tiny_model: list[str], tiny_data: list[str], tmp_path: Path
):
    overrides = [*tiny_model, *tiny_data, "trainer.steps=1"]
    for total in (1, 2):  # the second adds to the first
        study = search(num_trials=1, output=tmp_path, seed=total, overrides=overrides)
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
    study = search(num_trials=2, output=tmp_path, seed=0, overrides=overrides)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


def test_a_wrong_override_starts_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean"):
        search(num_trials=2, output=tmp_path / "out", seed=0, overrides=["trainer.stepz=1"])
    assert not (tmp_path / "out").exists()
