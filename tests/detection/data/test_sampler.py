from __future__ import annotations

import itertools
from typing import Any

import pytest

from detection.data.sampler import StepSampler, derive_seed, split_evaluation, spread
from detection.errors import UserError


def batches(**changes: Any) -> list[list[tuple[int, int]]]:
    settings: dict[str, Any] = {"num_images": 10, "batch_size": 4, "seed": 3, "num_steps": 9}
    sampler = StepSampler(**{**settings, **changes})
    listed = list(sampler)
    assert len(sampler) == len(listed)
    return listed


def test_each_epoch_holds_each_image_once():
    stream = list(itertools.chain.from_iterable(batches(num_steps=10)))
    assert [epoch for epoch, _ in stream] == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    epochs = [[i for epoch, i in stream if epoch == wanted] for wanted in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_only():
    assert batches() == batches()
    assert batches() != batches(seed=4)


@pytest.mark.parametrize("start_step", [0, 1, 5, 9, 12])
def test_resumed_order_is_the_same(start_step: int):
    assert batches(start_step=start_step) == batches()[start_step:]


def test_batch_larger_than_the_data_set():
    (batch,) = batches(num_images=3, batch_size=8, num_steps=1)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(i for _, i in batch[:3]) == [0, 1, 2]


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1, 3), (2, 1), (3, 2), (4, 3)])
def test_ranks_and_micro_batches_share_the_whole_batch(world_size: int, num_micro_batches: int):
    whole = batches(batch_size=12)
    shares = [
        batches(
            batch_size=12,
            world_size=world_size,
            rank=rank,
            num_micro_batches=num_micro_batches,
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        micro_batches = [
            part
            for share in shares
            for part in share[step * num_micro_batches : (step + 1) * num_micro_batches]
        ]
        assert len({len(part) for part in micro_batches}) == 1
        assert sorted(itertools.chain.from_iterable(micro_batches)) == sorted(batch)


def test_endless():
    sampler = StepSampler(num_images=3, batch_size=2, seed=0)
    assert len(list(itertools.islice(sampler, 50))) == 50
    with pytest.raises(TypeError):
        len(sampler)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 5, "world_size": 2}, {"num_micro_batches": 3}, {"batch_size": 0}],
)
def test_batches_that_cannot_be_shared(changes: dict[str, int]):
    with pytest.raises(UserError, match="multiple of") as caught:
        batches(**changes)
    assert len(str(caught.value).splitlines()) == 1


def test_no_images():
    with pytest.raises(UserError, match="no images"):
        batches(num_images=0)


def test_derived_seeds_differ():
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert len({derive_seed(*parts) for parts in itertools.product(range(5), repeat=3)}) == 125
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize("num_images", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_split_evaluation(num_images: int, world_size: int):
    shares = [
        split_evaluation(num_images, batch_size=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    everything = [i for share in shares for batch in share for i in batch]
    assert sorted(everything) == list(range(num_images))
    assert all(1 <= len(batch) <= 2 for share in shares for batch in share)


@pytest.mark.parametrize(
    ("num_images", "count", "expected"),
    [(96, 4, [0, 24, 48, 72]), (5, 3, [0, 1, 3]), (2, 9, [0, 1]), (0, 3, []), (4, 0, [])],
)
def test_a_few_are_spread_over_all(num_images: int, count: int, expected: list[int]):
    assert spread(num_images, count) == expected
