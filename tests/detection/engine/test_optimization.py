from __future__ import annotations

import pytest
import torch
from torch import nn

from condconv import CondConv2d
from detection.engine.optimization import (
    average_weights,
    build_optimizer,
    parameter_groups,
    warmup_constant,
    warmup_cosine,
)
from detection.errors import UserError
from detection.models.ssd import ssd_mobilenet_v1


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.3), (500, 0.6), (1000, 0.9), (10_500, 0.45), (20_000, 0.0)]
)
def test_the_schedule_of_the_paper(step: int, rate: float):
    factor = warmup_cosine(step, steps=20_000, warmup_steps=1000, warmup_start=1 / 3)
    assert 0.9 * factor == pytest.approx(rate, abs=1e-9)


def test_schedules_hold_their_ends():
    assert warmup_cosine(5, steps=5, warmup_steps=0, final=0.1) == pytest.approx(0.1)
    assert warmup_cosine(9, steps=5, warmup_steps=5) == pytest.approx(0.0)
    assert warmup_constant(0, warmup_steps=4, warmup_start=0.2) == pytest.approx(0.2)
    assert warmup_constant(400, warmup_steps=4) == 1.0
    assert warmup_constant(0, warmup_steps=0, warmup_start=0.2) == 1.0


def test_routers_of_timm_have_those_options_too():
    network = nn.ModuleDict(
        {"routing_fn": nn.Linear(4, 2), "conv": CondConv2d(4, 4, 1, num_experts=2)}
    )
    groups = parameter_groups(network, lr=1.0, router_lr_factor=0.1, router_weight_decay=0.01)
    routing = network["routing_fn"]
    assert [group["params"] for group in groups[2:]] == [[routing.weight], [routing.bias]]
    assert [group["lr"] for group in groups[2:]] == [0.1, 0.1]


def test_only_kernels_decay():
    network = ssd_mobilenet_v1(num_classes=2, width=0.25, num_experts=2, input_size=64)
    decayed, plain = parameter_groups(network)
    assert "weight_decay" not in decayed and plain["weight_decay"] == 0.0
    assert {parameter.dim() for parameter in decayed["params"]} == {4, 5}
    assert {parameter.dim() for parameter in plain["params"]} == {1, 2}
    total = len(decayed["params"]) + len(plain["params"])
    assert total == len(list(network.parameters()))


@pytest.mark.parametrize(("factor", "decay"), [(1.0, 0.0), (0.1, 0.0), (1.0, 0.01), (3.0, 0.02)])
def test_routers_have_options_of_their_own(factor: float, decay: float):
    network = ssd_mobilenet_v1(num_classes=2, width=0.25, num_experts=2, input_size=64)
    config = {"_target_": "torch.optim.SGD", "lr": 0.5, "weight_decay": 0.1}
    options = {"router_lr_factor": factor, "router_weight_decay": decay}
    plain, optimizer = (build_optimizer(content, network) for content in (config, config | options))
    settings, before = (
        {
            id(parameter): (group["lr"], group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }
        for groups in (optimizer.param_groups, plain.param_groups)
    )
    for name, parameter in network.named_parameters():
        expected = before[id(parameter)]
        if "router" in name:
            assert expected == (0.5, 0.0)
            expected = (0.5 * factor, decay if name.endswith("weight") else 0.0)
        assert settings.pop(id(parameter)) == expected, name
    assert not settings
    if factor == 1 and decay == 0:
        assert len(optimizer.param_groups) == len(plain.param_groups)


def test_router_options_of_a_static_network_do_nothing():
    network = ssd_mobilenet_v1(num_classes=2, width=0.25, num_experts=1, input_size=64)
    assert len(parameter_groups(network, lr=1.0, router_lr_factor=0.1)) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"router_lr_factor": -1.0}, "router_lr_factor"),
        ({"router_lr_factor": "high"}, "router_lr_factor"),
        ({"router_weight_decay": None}, "router_weight_decay"),
        ({"router_lr_factor": 2.0, "lr": "high"}, r"optimizer\.lr"),
        ({"lr": -1.0}, "SGD"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, object], named: str):
    network = ssd_mobilenet_v1(num_classes=2, width=0.25, num_experts=2, input_size=64)
    with pytest.raises(UserError, match=named):
        build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.5, **changes}, network)


def test_the_moving_average_follows_its_formula():
    network = nn.BatchNorm1d(1)
    ema = average_weights(network, decay=0.5)
    expected = None
    for update in range(20):
        network.weight.data.fill_(float(update))
        network.running_mean.fill_(float(update))  # pyright: ignore[reportOptionalMemberAccess]
        network.num_batches_tracked.add_(1)  # pyright: ignore[reportOptionalMemberAccess]
        ema.update_parameters(network)
        decay = min(0.5, (1 + update) / (10 + update))
        new = float(update)
        expected = new if expected is None else decay * expected + (1 - decay) * new
        assert ema.module.weight.item() == pytest.approx(expected)
        assert ema.module.running_mean.item() == pytest.approx(expected)
    assert int(ema.module.num_batches_tracked) == 20
    assert torch.is_tensor(ema.n_averaged)
