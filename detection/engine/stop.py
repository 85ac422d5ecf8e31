"""Stopping a run from outside, without losing what it has done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, in which a signal may come
    from torch.utils.data import DataLoader


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once.

    Attributes:
        received: whether one has come, to this process or to another of a run that it was given to.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


@contextmanager
def start_loader(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """`iter(loader)`, whose workers are deaf to SIGINT and SIGTERM and end with the context.

    A signal to the whole group (Ctrl-C, a scheduler's SIGTERM) is for the main process, which needs
    its workers for the step at hand. They inherit a mask, since a handler would come too late for
    some. At an error they must end here: the program's exit would send them SIGTERM, and wait.

    Raises:
        RuntimeError: inside, where a worker has died.
    """
    with _signals_blocked():
        batches: Any = iter(loader)
    try:
        yield batches
    except (ConnectionError, EOFError) as error:
        # What a worker leaves that dies while it hands over a batch; of others torch tells itself.
        dead = []
        for worker in getattr(batches, "_workers", ()):
            worker.join(timeout=0.5)
            if not worker.is_alive():
                dead.append(str(worker.pid))
        if not dead:
            raise
        pids = ", ".join(dead)
        raise RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly") from error
    finally:
        if loader.num_workers > 0:
            batches._shutdown_workers()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
