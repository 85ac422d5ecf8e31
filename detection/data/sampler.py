"""Which images make up each training step and each evaluation batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b

import torch
from torch.utils.data import Sampler

from detection.errors import UserError


def derive_seed(*parts: int) -> int:
    """A generator seed that depends on all `parts`: equal ones agree, others are unrelated."""
    digest = blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def spread(num_images: int, count: int) -> list[int]:
    """Indices of `count` images, spread evenly over all; of all where there are fewer."""
    count = min(count, num_images)
    return [i * num_images // count for i in range(count)]


@lru_cache(maxsize=2)
def _shuffle(num_images: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(num_images, generator=generator).tolist()


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for training by steps: a `batch_sampler` of a DataLoader.

    The images form one endless stream, epoch after epoch, each in an order of its own. Step `s`
    takes the positions from `s * batch_size` to `(s + 1) * batch_size`, across the end of an epoch
    where it comes; rank `r` takes each `world_size`-th of them, in `num_micro_batches` lists. So
    the order depends on nothing but the seed and the position, and the step is all its state.

    Args:
        num_images: how many images there are.
        batch_size: images a step, over all ranks and micro batches.
        seed: what the order depends on.
        start_step: the first step, to go on where another run stopped.
        num_steps: the step to end before, counted from 0; endless if None.
        rank: the number of this process.
        world_size: how many processes there are.
        num_micro_batches: into how many lists a step's share is cut.

    Raises:
        UserError: `batch_size` cannot be shared out evenly, or there are no images.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        num_steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_micro_batches: int = 1,
    ) -> None:
        if num_images < 1:
            raise UserError("there are no images to train on")
        if batch_size < 1 or batch_size % (world_size * num_micro_batches):
            raise UserError(
                f"a batch of {batch_size} images cannot be shared by {world_size} process(es) with "
                f"{num_micro_batches} micro batch(es) each: "
                f"it has to be a multiple of {world_size * num_micro_batches}"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps
        self.rank = rank
        self.world_size = world_size
        self.num_micro_batches = num_micro_batches

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("an endless sampler has no length")
        return max(self.num_steps - self.start_step, 0) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        micro_batch_size = self.batch_size // (self.world_size * self.num_micro_batches)
        while self.num_steps is None or step < self.num_steps:
            first, last = step * self.batch_size, (step + 1) * self.batch_size
            share = [self._item(p) for p in range(first + self.rank, last, self.world_size)]
            for start in range(0, len(share), micro_batch_size):
                yield share[start : start + micro_batch_size]
            step += 1

    def _item(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_images)
        return epoch, _shuffle(self.num_images, self.seed, epoch)[place]


def split_evaluation(
    num_images: int, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """This rank's images in batches: a `batch_sampler` for evaluation.

    Over all ranks each image comes exactly once, so ranks may have different numbers of batches.
    """
    share = range(rank, num_images, world_size)
    return [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
