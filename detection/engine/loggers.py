"""Where scalars go besides metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Logger(Protocol):
    """What the train loop asks of a logger."""

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardLogger:
    """Writes TensorBoard event files.

    Args:
        folder: for the event files.
        start_step: later steps of an earlier, killed run are hidden.
    """

    def __init__(self, *, folder: str | Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class NoLogger:
    """Writes nothing; metrics.jsonl is written all the same."""

    def __init__(self, *, folder: str | Path, start_step: int = 0) -> None:
        del folder, start_step

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        del scalars, step

    def close(self) -> None:
        pass
