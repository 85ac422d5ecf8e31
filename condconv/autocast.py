"""Whether autocast is in force, and doing without."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_autocast_on(x: Tensor) -> bool:
    """Whether autocast is in force on the device of x; devices without it (meta) included."""
    if x.is_cpu:  # asking for a device's name takes as long as all checks of a call's shapes
        return torch.is_autocast_enabled("cpu")
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def disable_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Compute in the tensors' own precision on the device of x."""
    # Where there is nothing to disable, the context alone would cost as much as a small layer.
    if is_autocast_on(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
