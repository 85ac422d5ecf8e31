"""Parameter groups, learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from condconv import CondConv2d, Router, find_routers
from detection.build import build, build_partial
from detection.errors import UserError, first_line

ROUTER_OPTIONS = ("router_lr_factor", "router_weight_decay")


def build_optimizer(config: Mapping[str, Any], network: nn.Module) -> Optimizer:
    """Build the optimizer of a network.

    Args:
        config: the `optimizer` section: `_target_` and arguments of a torch optimizer, and, where
            they differ from its defaults, the options of `parameter_groups`.

    Raises:
        UserError: where the target does not exist or an argument is refused.
    """
    arguments = dict(config)
    options = {key: arguments.pop(key) for key in ROUTER_OPTIONS if key in arguments}
    for key, value in options.items():
        if not isinstance(value, int | float) or value < 0:
            raise UserError(f"optimizer.{key} must be a number from 0 on, not {value!r}")
    groups = parameter_groups(network, lr=arguments.get("lr"), **options)
    return build(arguments, params=groups)


def parameter_groups(
    network: nn.Module,
    *,
    lr: float | None = None,
    router_lr_factor: float = 1.0,
    router_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the kernels of convolutions, which take its weight decay, and all
    else (biases, batch norm, routers), which takes none; then, where routers are to be trained
    otherwise, their weights and their biases.

    Args:
        lr: the optimizer's learning rate; needed for `router_lr_factor` alone.
        router_lr_factor: learning rate of the routers, relative to `lr`.
        router_weight_decay: of the routers' weights, not of their biases.

    Raises:
        UserError: where there is no `lr` to scale, or it is no number.
    """
    modules = list(network.modules())
    kernels = {id(child.weight) for child in modules if isinstance(child, (nn.Conv2d, CondConv2d))}
    routers = [
        router.linear if isinstance(router, Router) else router
        for router in find_routers(network).values()
    ]
    if router_lr_factor == 1 and router_weight_decay == 0:
        routers = []
    weights = {id(linear.weight) for linear in routers}
    biases = {id(linear.bias) for linear in routers}
    trainable = {id(item): item for item in network.parameters() if item.requires_grad}

    def group(ids: Set[int], **options: float) -> dict[str, Any]:
        return {"params": [item for key, item in trainable.items() if key in ids], **options}

    groups = [
        group(kernels),
        group(trainable.keys() - kernels - weights - biases, weight_decay=0.0),
    ]
    if routers:
        rate = {}
        if router_lr_factor != 1:
            if not isinstance(lr, int | float):
                raise UserError("optimizer.router_lr_factor needs a number as optimizer.lr")
            rate["lr"] = lr * router_lr_factor
        groups += [
            group(weights, weight_decay=router_weight_decay, **rate),
            group(biases, weight_decay=0.0, **rate),
        ]
    return groups


def build_schedule(config: Mapping[str, Any], optimizer: Optimizer) -> LambdaLR:
    """Build the schedule of an optimizer's learning rate.

    Args:
        config: the `schedule` section: a function of the step that gives a factor, and arguments.

    Raises:
        UserError: where the function does not exist or refuses an argument.
    """
    factor = build_partial(config)
    try:
        factor(2**40)  # beyond any warm-up, whose arguments the first step needs
        return LambdaLR(optimizer, factor)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"schedule: {first_line(error)}") from error


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
    if step < warmup_steps:
        return warmup_start + (1 - warmup_start) * step / warmup_steps
    return 1.0


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and batch-norm statistics.

    The decay grows with the number of updates n, min(decay, (1 + n) / (10 + n)), so that the
    random start is soon forgotten (as in TensorFlow's ExponentialMovingAverage).
    """

    def update(averages: Any, currents: Any, num_averaged: Tensor | int) -> None:
        if averages[0].is_floating_point():  # AveragedModel hands over tensors of one dtype
            count = int(num_averaged)
            weight = 1 - min(decay, (1 + count) / (10 + count))
            torch._foreach_lerp_(averages, currents, weight)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_copy_(averages, currents)  # pyright: ignore[reportPrivateImportUsage]

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
