"""The folder of a training run, and the logging of its text."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from detection.checkpoint import DamagedCheckpoint, load_checkpoint
from detection.engine.processes import Processes
from detection.errors import UserError
from detection.files import whole_file

LOGGER = logging.getLogger("detection")


class RunFolder:
    """Where everything of a run lies."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "train.log"
        self.metrics_lines = self.path / "metrics.jsonl"
        self.metrics = self.path / "metrics.json"
        self.detections = self.path / "detections.json"
        self.last = self.path / "checkpoints" / "last.pt"
        self.best = self.path / "checkpoints" / "best.pt"
        self.visualizations = self.path / "visualizations"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it.

        The lock goes with the process, however that ends. It is one of POSIX (`lockf`), because
        `flock` would pass on to the loader's workers, which outlive a killed run for seconds.

        Raises:
            UserError: where another process has the lock, or nothing can be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error}") from error
        with file:
            if sys.platform != "win32":
                import fcntl

                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EACCES, errno.EAGAIN):
                        file.seek(0)
                        holder = file.read() or "another run"
                        raise UserError(
                            f"{self.path} is in use by {holder}: stop that run, or give "
                            "another run_dir"
                        ) from error
                    LOGGER.warning(
                        "%s: its file system has no locks: start no second run", self.path
                    )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def numbered(self, step: int) -> Path:
        """Where the checkpoint of a step goes when it is no longer the last."""
        return self.last.with_name(f"step_{step:08d}.pt")

    def list_numbered(self) -> list[Path]:
        """The checkpoints before last.pt, newest first."""
        return sorted(self.last.parent.glob("step_*.pt"), reverse=True)

    def load_newest(self, processes: Processes) -> dict[str, Any] | None:
        """The newest whole checkpoint, the same one in all processes; None before the first.

        Raises:
            UserError: where none is whole, or one is of another program.
        """
        path, content = self._find_whole() if processes.is_main else (None, None)
        path = processes.share(path)
        return load_checkpoint(path) if path and content is None else content

    def _find_whole(self) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
        """Damaged ones are put aside, so that none takes the place of a whole one later."""
        if not any(path.suffix != ".tmp" for path in self.last.parent.glob("*")):
            LOGGER.warning("%s has no checkpoint yet: starting anew", self.path)
            return None, None
        for path in (self.last, *self.list_numbered(), self.best):
            if not path.exists():
                continue
            try:
                content = load_checkpoint(path)
            except DamagedCheckpoint as error:
                aside = path.replace(path.with_name(f"{path.name}.damaged"))
                LOGGER.warning("%s; it is now %s", error, aside.name)
                continue
            if path != self.last:
                LOGGER.warning("going on from %s, step %d", path, content["step"])
            return path, content
        raise UserError(f"{self.last.parent} holds no whole checkpoint: give another run_dir")

    def check_new(self) -> None:
        """Raise a UserError where a run lies there already."""
        if self.config.exists():
            raise UserError(
                f"{self.path} already holds a run: give another run_dir, or resume=true"
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write the config into it."""
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.config) as partial:
                partial.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error}") from error

    def read_config(self) -> Any:
        """The config that the run was started with.

        Raises:
            UserError: where no run lies there.
        """
        try:
            config = OmegaConf.load(self.config)
            if "model" not in config or "trainer" not in config:
                raise ValueError("it is no config of a run")
            return config
        except FileNotFoundError as error:
            raise UserError(
                f"resume=true, but {self.config} is not there: give the run_dir of a run"
            ) from error
        except (OSError, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot read {self.config}: {reason}") from error

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with self.metrics_lines.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Forget the lines after a step: a resumed run writes them again."""
        if not self.metrics_lines.exists():
            return
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        with whole_file(self.metrics_lines) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; empty where there is none."""
        records = []
        if self.metrics_lines.exists():
            for line in self.metrics_lines.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:  # the line that a kill cut short
                    break
        return records


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run folder.

    Raises:
        UserError: where it is not there, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}, which the run wrote at its best evaluation: evaluate its "
            "best.pt with eval_det.py instead"
        ) from error


def start_logging(console: Console, log_file: Path | None, *, is_main: bool = True) -> None:
    """Send the program's text to the console, and to a file where one is given.

    Where the console shows a progress bar, the lines of single steps (DEBUG) go to the file only.
    Processes other than the main one only warn, and only on the console.
    """
    for old in list(LOGGER.handlers):
        LOGGER.removeHandler(old)
        old.close()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.DEBUG if is_main else logging.WARNING)
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        handler.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    if log_file and is_main:
        file_handler = logging.FileHandler(log_file)
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(file_handler)
