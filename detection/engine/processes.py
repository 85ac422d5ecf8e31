"""The processes of one run: one, or several started by `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detection.errors import UserError, first_line

T = TypeVar("T")


class Processes(NamedTuple):
    """This process's place among all of the run.

    Args:
        rank: 0 to world_size - 1; rank 0 writes files.
        world_size: number of processes.
        device: where this process computes.
        local_rank: its number on its node.
    """

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def share_buffers(self, network: nn.Module) -> None:
        """Rank 0's buffers, in every process: batch norm's statistics are each process's own."""
        if self.world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process."""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, in rank 0; nothing in the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def share(self, value: T) -> T:
        """Rank 0's value, in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def first_then_others(self, load: Callable[[], T]) -> T:
        """`load()`, in one process of each node before the others: they find what it has left.

        Raises:
            UserError: that of the first process that meets one, in all of them.
        """
        if self.world_size == 1:
            return load()
        value: T | None = None
        for is_turn in (self.local_rank == 0, self.local_rank != 0):
            reason = None
            if is_turn:
                try:
                    value = load()
                except UserError as error:
                    reason = str(error)
            reasons: list[str | None] = [None] * self.world_size
            dist.all_gather_object(reasons, reason)
            for known in filter(None, reasons):
                raise UserError(known)
        return cast("T", value)


def launcher() -> str:
    """The words before the script on the command line that started these processes."""
    if not dist.is_torchelastic_launched():
        return "python"
    per_node, num_nodes = os.environ["LOCAL_WORLD_SIZE"], os.environ["GROUP_WORLD_SIZE"]
    nodes = f"--nnodes {num_nodes} " if num_nodes != "1" else ""
    return f"torchrun {nodes}--nproc-per-node {per_node}"


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the group that `torchrun` describes in the environment, or be the only process.

    Args:
        device: "auto" takes a GPU where there is one; or "cpu", "cuda", "cuda:N".

    Raises:
        UserError: where the device does not exist; and, from inside, where another process of the
            run or a loader's worker has died.
    """
    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world_size, chosen, local_rank)
    except RuntimeError as error:
        reason = _name_dead(error)
        if reason is None:
            raise
        raise UserError(reason) from error
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def _name_dead(error: RuntimeError) -> str | None:
    """Which process has died, where that is what an error of torch means."""
    line = first_line(error)
    if line.startswith("DataLoader worker"):
        return (
            f"{line.removesuffix('.').strip()}; often memory was short: lower num_workers or "
            "raise the limit; a run goes on with resume=true"
        )
    if isinstance(error, dist.DistError) or "gloo" in line:
        return f"another process of this run has ended, and its message tells why ({line})"
    return None


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that a config's `device` means.

    Raises:
        UserError: where it does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device}: give auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise UserError(f"device={device}: give auto, cpu, cuda or cuda:N")
    index = local_rank if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise UserError(
            f"device={device}: GPU {index} is not there, {torch.cuda.device_count()} are visible"
        )
    return torch.device("cuda", index)
