"""Each logger gets the scalars and pictures of a run, from its own process or a resumed one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from detection.errors import UserError

STEPS = ("trainer.evaluate_every=2", "schedule.steps=4")


def train_in_two_parts(run: Callable[..., Path], *overrides: str) -> Path:
    """Four steps, evaluated at the second and fourth."""
    run("trainer.steps=2", *STEPS, *overrides)
    return run("trainer.steps=4", "resume=true", *overrides)


def test_tensorboard(run: Callable[..., Path]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_in_two_parts(run, "logger=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("evaluation/AP50")] == [2, 4]
    pictures = events.Images("detections")
    assert [picture.step for picture in pictures] == [2, 4]
    assert pictures[0].width > 200 and pictures[0].height > 200


def test_mlflow(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = (tmp_path / "mlruns").as_uri()
    folder = train_in_two_parts(run, "logger=mlflow", f"logger.tracking_uri='{uri}'")
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("detection")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == folder.name
    for name, steps in (("train/loss", [1, 2, 3, 4]), ("evaluation/AP50", [2, 4])):
        history = client.get_metric_history(found.info.run_id, name)
        assert [metric.step for metric in history] == steps
    pictures = Path(client.download_artifacts(found.info.run_id, "detections"))
    assert sorted(path.name for path in pictures.iterdir()) == [
        *("step_00000002.png", "step_00000004.png")
    ]
    assert Image.open(pictures / "step_00000002.png").width > 200


def test_wandb(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train_in_two_parts(run, "logger=wandb", "logger.mode=offline")
    parts = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    id = (folder / "wandb_id").read_text()
    for part in parts:
        (file,) = part.glob("*.wandb")
        assert file.name == f"run-{id}.wandb"
        content = file.read_bytes()
        assert b"evaluation/AP50" in content and b"train/loss" in content
        (picture,) = (part / "files" / "media" / "images").glob("detections_*.png")
        assert Image.open(picture).width > 200


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_one_line(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"logger={name} needs {name}: pip install .*\[{name}\]"):
        run("trainer.steps=1", f"logger={name}")


def test_a_logger_that_refuses_is_one_line(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    with pytest.raises(UserError, match=r"logger=mlflow: .*nowhere"):
        run("trainer.steps=1", "logger=mlflow", "logger.tracking_uri=nowhere://x")
