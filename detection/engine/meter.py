"""Means of the losses, and the speed."""

from __future__ import annotations

import time
from datetime import timedelta

from detection.engine.settings import TrainerSettings


class Meter:
    """Means of the losses and the speed since they were last read."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._sums: dict[str, float] = {}
        self._count = 0
        self._seconds = 0.0
        self._seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self._last = time.perf_counter()

    def update(self, losses: dict[str, float]) -> None:
        """Take in one step."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._count += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        """The means, and images per second; then start anew."""
        self._seconds_per_step = self._seconds / self._count
        scalars = {name: value / self._count for name, value in self._sums.items()}
        scalars["images_per_second"] = self._settings.batch_size / self._seconds_per_step
        self._sums, self._count, self._seconds = {}, 0, 0.0
        return scalars

    def describe(self, step: int, scalars: dict[str, float]) -> str:
        """A line for people: losses, learning rate, speed, time left."""
        left = timedelta(seconds=round((self._settings.steps - step) * self._seconds_per_step))
        losses = "  ".join(
            f"{name} {value:.4f}"
            for name, value in scalars.items()
            if name not in ("images_per_second", "learning_rate")
        )
        return (
            f"{losses}  lr {scalars['learning_rate']:.5f}  "
            f"{scalars['images_per_second']:.1f} images/s  {left} left"
        )
