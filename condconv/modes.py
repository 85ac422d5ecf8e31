"""Training and inference modes, kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keep_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules back the modes that they have now, each its own, at the end of the `with`."""
    modes = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode  # `train` would set all below it too
