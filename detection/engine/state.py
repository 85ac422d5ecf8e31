"""What changes while training, saved and restored as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from detection.engine.processes import Processes
from detection.errors import UserError, first_line


@dataclass
class TrainState:
    """All that changes while training.

    Args:
        network: the detector's network.
        optimizer: over its parameters.
        schedule: of the learning rate.
        scaler: of the loss, enabled where the precision is fp16.
        ema: moving average of the network, or None.
        step: optimizer steps taken.
        best_metric: best AP so far.
        stale_evaluations: evaluations since then.
        owes_evaluation: an evaluation of this step is due and not done.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None = None
    step: int = 0
    best_metric: float = -math.inf  # COCO has -1 where there is nothing to find
    stale_evaluations: int = 0
    owes_evaluation: bool = False

    @property
    def averaged_network(self) -> nn.Module:
        """The network to evaluate: the moving average where there is one."""
        return self.network if self.ema is None else self.ema.module

    @property
    def num_overflows(self) -> int:
        """Steps so far that changed nothing, as their gradients overflowed in fp16."""
        return self.step - self.schedule.last_epoch

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row were no better; None is never."""
        return patience is not None and self.stale_evaluations >= patience

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """Tensors and plain values, for `save_checkpoint`; call it in every process."""
        cuda = processes.device.type == "cuda"
        own = (torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None)
        return {
            "model": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best_metric": self.best_metric,
            "stale_evaluations": self.stale_evaluations,
            "owes_evaluation": self.owes_evaluation,
            "random_states": processes.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any], processes: Processes) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            UserError: where the state is of a run with other settings.
        """
        if self.ema is not None and state["ema"] is None:
            raise UserError(
                "trainer.ema_decay: the run has no moving average to go on with: leave it null"
            )
        try:
            self.network.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
                self.ema.n_averaged.fill_(state["ema_updates"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self._set_rates()
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"the checkpoint is of a run with other settings: {reason}") from error
        self.step = state["step"]
        self.best_metric = state["best_metric"]
        self.stale_evaluations = state["stale_evaluations"]
        self.owes_evaluation = state["owes_evaluation"]
        if processes.rank < len(state["random_states"]):
            cpu, cuda = state["random_states"][processes.rank]
            torch.set_rng_state(cpu)
            if cuda is not None and processes.device.type == "cuda":
                torch.cuda.set_rng_state(cuda)

    def _set_rates(self) -> None:
        """The learning rates of today's schedule: those saved are of the one that the run had."""
        schedule = self.schedule
        for group, rate, factor in zip(
            self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * factor(schedule.last_epoch)
