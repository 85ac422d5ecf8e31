"""Whether autocast is in force, and doing without."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is in force; devices without it (meta) included."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def disable_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Compute in the tensors' own precision."""
    # Where there is nothing to disable, the context alone would cost as much as a small layer.
    if is_autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
