"""Where scalars and pictures go besides the files of the run folder."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from detection.engine.run_folder import LOGGER
from detection.errors import UserError, first_line


class Logger(Protocol):
    """What the train loop asks of a logger; the main process alone has one.

    One is made with `folder`, that of the run; `start_step`, the step that a resumed run goes on
    from; `config`, the whole of it; and the keys of its own config.
    """

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None: ...

    def log_picture(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        """Log what `draw` gives; a logger without pictures does not call it."""

    def close(self, *, failed: bool) -> None:
        """End with the run, which an error has ended where `failed`."""


class NoLogger:
    """Writes nothing; metrics.jsonl is written all the same."""

    def __init__(self, **_: Any) -> None: ...

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None: ...

    def log_picture(self, name: str, draw: Callable[[], Image.Image], step: int) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class PatientLogger:
    """Passes all on to a logger, and where that fails warns once: a run outlives its tracker."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._warned = False

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._logger.log_scalars(scalars, step))

    def log_picture(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        self._try(lambda: self._logger.log_picture(name, draw, step))

    def close(self, *, failed: bool) -> None:
        self._try(lambda: self._logger.close(failed=failed))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # each logger's library has its own
            if not self._warned:
                LOGGER.warning(
                    "the logger failed, and the run goes on; metrics.jsonl has all (%s: %s)",
                    type(error).__name__,
                    first_line(error),
                )
            self._warned = True


class TensorBoardLogger:
    """Writes TensorBoard event files; later steps of an earlier, killed run are hidden."""

    def __init__(self, *, folder: Path, start_step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        del config  # it is in the run folder
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def log_picture(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        self._writer.add_image(name, np.asarray(draw()), step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandbLogger:
    """Writes to Weights & Biases. A resumed run goes on in the same run there; the steps since its
    last checkpoint are there twice, with the same values.

    Args:
        project, entity, mode: as in `wandb.init`; None is its own default.

    Raises:
        UserError: wandb is not installed, or refuses.
    """

    def __init__(
        self,
        *,
        folder: Path,
        start_step: int,
        config: Mapping[str, Any],
        project: str,
        entity: str | None = None,
        mode: Any = None,
    ) -> None:
        del start_step
        self._wandb = _import("wandb")
        id_file = folder / "wandb_id"
        try:
            self._run = self._wandb.init(
                project=project,
                entity=entity,
                mode=mode,
                dir=folder,
                name=folder.name,
                config=dict(config),
                id=id_file.read_text() if id_file.exists() else None,
                resume="allow",
            )
        except self._wandb.Error as error:
            raise UserError(f"logger=wandb: {first_line(error)}") from error
        id_file.write_text(self._run.id)
        # Its own step may not go back, as that of a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log({**scalars, "step": step})

    def log_picture(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        self._run.log({name: self._wandb.Image(draw()), "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflowLogger:
    """Writes to MLflow. A resumed run goes on in the same run there.

    Args:
        experiment: its name; made where there is none.
        tracking_uri: where MLflow keeps its runs; None is its own default.

    Raises:
        UserError: mlflow is not installed, or refuses.
    """

    def __init__(
        self,
        *,
        folder: Path,
        start_step: int,
        config: Mapping[str, Any],
        experiment: str,
        tracking_uri: str | None = None,
    ) -> None:
        del start_step
        mlflow = _import("mlflow")
        self._metric = mlflow.entities.Metric
        id_file = folder / "mlflow_id"
        try:
            self._client = mlflow.MlflowClient(tracking_uri)
            if id_file.exists():
                self._id = id_file.read_text()
                self._client.update_run(self._id, status="RUNNING")
            else:
                known = self._client.get_experiment_by_name(experiment)
                own = known.experiment_id if known else self._client.create_experiment(experiment)
                self._id = self._client.create_run(own, run_name=folder.name).info.run_id
                id_file.write_text(self._id)
                self._client.log_dict(self._id, dict(config), "config.yaml")
        except mlflow.MlflowException as error:
            raise UserError(f"logger=mlflow: {first_line(error)}") from error

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._id, metrics)

    def log_picture(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        self._client.log_image(self._id, draw(), f"{name}/step_{step:08d}.png")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"logger={name} needs {name}: pip install -e '.[{name}]'") from error
