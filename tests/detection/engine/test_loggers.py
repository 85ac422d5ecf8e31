"""Each logger gets the scalars and pictures of a run, from its own process or a resumed one."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from detection.build import build
from detection.checkpoint import load_checkpoint
from detection.config import plain
from detection.data.sources import data_source, load_split
from detection.engine import loggers
from detection.errors import UserError
from detection.visualization.gallery import contact_sheet
from detection.visualization.results import draw_pairs

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


def test_the_picture_shows_the_detections(
    run: Callable[..., Path], compose_config: Callable[..., Any], tiny_data: list[str]
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    threshold = "evaluation.picture_score_threshold=0"
    folder = run("trainer.steps=2", "logger=tensorboard", threshold)
    (event,) = EventAccumulator(str(folder / "tensorboard")).Reload().Images("detections")
    data = plain(compose_config("train", tiny_data))["data"]
    index = load_split(build(data_source(data)).val)
    results = json.loads((folder / "detections.json").read_text())

    def draw(results: list[Any]) -> Image.Image:
        pairs = draw_pairs(index, results, num_pictures=6, score_threshold=0)
        return contact_sheet(list(pairs.values()), columns=2, max_size=600)

    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert picture.tobytes() == draw(results).tobytes() != draw([]).tobytes()


class RaisingLogger:
    """Is out of order, but notes how it is closed."""

    closed: ClassVar[list[bool]] = []

    def __init__(self, **_: Any) -> None: ...

    def log_scalars(self, scalars: Any, step: int) -> None:
        raise ConnectionError("the server is away\nand more")

    log_picture = log_scalars

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)
        raise ConnectionError("still away")


def test_a_logger_that_fails_stops_no_run(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    assert_equal_weights: Callable[[Path, Path], None],
):
    """One line tells; how the run ended is passed on."""
    common = ("trainer.steps=4", "trainer.evaluate_every=2")
    whole = run(*common, name="whole")
    monkeypatch.setattr(loggers, "NoLogger", RaisingLogger)
    folder = run(*common)
    assert_equal_weights(whole, folder)
    log = (folder / "train.log").read_text()
    assert log.count("the logger failed") == log.count("(ConnectionError: the server is away)") == 1
    assert RaisingLogger.closed == [False]

    def fail(*_: Any) -> None:
        raise UserError("the images are gone")

    monkeypatch.setattr("detection.engine.train.take_step", fail)
    with pytest.raises(UserError, match="the images are gone"):
        run(*common, name="failed")
    assert RaisingLogger.closed == [False, True]


def test_an_evaluation_is_saved_before_it_is_logged(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A logger may take minutes, in which a run may be killed."""
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    steps: list[int] = []

    def note(self: Any, name: str, draw: Any, step: int) -> None:
        steps.append(load_checkpoint(last)["step"])

    monkeypatch.setattr(loggers.NoLogger, "log_picture", note)
    run("trainer.steps=4", "trainer.evaluate_every=2")
    assert steps == [2, 4]


def test_mlflow(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = (tmp_path / "mlruns").as_uri()
    batches: list[Any] = []
    log_batch = mlflow.MlflowClient.log_batch

    def log_and_note(*arguments: Any) -> None:
        batches.append(arguments)
        log_batch(*arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_and_note)
    folder = train_in_two_parts(run, "logger=mlflow", f"logger.tracking_uri='{uri}'")
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("detection")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == folder.name
    assert len(batches) == 4 + 2  # a request each
    for name, steps in (("train/loss", [1, 2, 3, 4]), ("evaluation/AP50", [2, 4])):
        history = client.get_metric_history(found.info.run_id, name)
        assert [metric.step for metric in history] == steps
    pictures = Path(client.download_artifacts(found.info.run_id, "detections"))
    assert sorted(path.name for path in pictures.iterdir()) == [
        *("step_00000002.png", "step_00000004.png")
    ]
    assert Image.open(pictures / "step_00000002.png").width > 200

    def fail(*_: Any) -> None:
        raise UserError("the images are gone")

    monkeypatch.setattr("detection.engine.train.take_step", fail)
    with pytest.raises(UserError, match="the images are gone"):
        run("trainer.steps=5", "resume=true", "logger=mlflow", f"logger.tracking_uri='{uri}'")
    assert client.get_run(found.info.run_id).info.status == "FAILED"


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
        deadline = time.monotonic() + 60  # a process of W&B's own writes it, after the run's end
        while (content := file.read_bytes()) and time.monotonic() < deadline:
            if b"evaluation/AP50" in content and b"train/loss" in content:
                break
            time.sleep(0.1)
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
