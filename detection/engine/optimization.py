"""Parameter groups, learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from condconv import CondConv2d


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the kernels of convolutions, which take its weight decay, and
    all else (biases, batch norm, routers), which takes none.
    """
    kernels = {
        id(module.weight)
        for module in network.modules()
        if isinstance(module, (nn.Conv2d, CondConv2d))
    }
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if id(parameter) in kernels]},
        {
            "params": [parameter for parameter in trainable if id(parameter) not in kernels],
            "weight_decay": 0.0,
        },
    ]


def warmup_cosine(
    step: int, *, steps: int, warmup_steps: int, warmup_start: float = 0.0, final: float = 0.0
) -> float:
    """Factor on the learning rate: linear warm-up, then cosine.

    Args:
        step: steps taken so far.
        steps: where the cosine ends.
        warmup_steps: where the factor reaches 1.
        warmup_start: the factor at step 0.
        final: the factor at the end.
    """
    if step < warmup_steps:
        return warmup_start + (1 - warmup_start) * step / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def warmup_constant(step: int, *, warmup_steps: int, warmup_start: float = 0.0) -> float:
    """Factor on the learning rate: linear warm-up, then 1; see `warmup_cosine`."""
    return min(1.0, warmup_start + (1 - warmup_start) * step / max(warmup_steps, 1))


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and batch-norm statistics.

    The decay grows with the number of updates n, min(decay, (1 + n) / (10 + n)), so that the
    random start is soon forgotten (as in TensorFlow's ExponentialMovingAverage).
    """

    def update(average: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        if not average.is_floating_point():
            return current
        count = int(num_averaged)
        return average.lerp(current, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(network, avg_fn=update, use_buffers=True)
