"""The law of the order: each sample once an epoch, and a resumed run sees what an uninterrupted one would have."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.augment import Augmentation
from pipeline.data.batch import Batch
from pipeline.data.loader import Batching, Items, TrainLoader, TrainShares, Workers


@dataclass
class CountingSplit:
    """A split of so many samples a shard."""

    shard_counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.shard_counts)

    @cached_property
    def label_S(self) -> np.ndarray:
        return np.arange(len(self)) % 7


@dataclass
class CountingImages:
    """Images that need no decoding: each shows its number and its key."""

    split: CountingSplit

    def load_or_substitute(self, sample, crop, seed, epoch):
        return np.full((2, 2, 3), (sample + crop.keywords["key"]) % 251, np.uint8), sample, []


def no_evaluation() -> None:
    raise AssertionError("no validation here")


def ranks_of(counts: tuple[int, ...], world: int, workers: int, **batching: int) -> list[TrainLoader]:
    loaders = []
    for rank in range(world):
        how = Batching(world=world, rank=rank, workers=workers, **batching)
        shares = TrainShares(CountingImages(CountingSplit(counts)), Augmentation(2), how)
        loaders.append(TrainLoader(Workers(Items(shares, no_evaluation), workers)))
    return loaders


def steps_of(ranks: list[TrainLoader], count: int) -> list[Batch]:
    """The next global batches over all ranks, put together again in their order; epochs follow one another."""
    iterators = [iter(rank) for rank in ranks]
    steps = []
    for _ in range(count):
        pieces = []
        for _ in range(ranks[0].batching.pieces):
            for number, rank in enumerate(ranks):
                batch = next(iterators[number], None)
                if batch is None:  # the epoch ended
                    iterators[number] = iter(rank)
                    batch = next(iterators[number])
                pieces.append(batch)
        steps.append(Batch(*(torch.cat(columns) for columns in zip(*pieces, strict=True))))
    return steps


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for ours, theirs in zip(left, right, strict=True) for a, b in zip(ours, theirs, strict=True)
    )


counts = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(tuple)
worlds, micros = st.integers(1, 5), st.integers(0, 9)


def check_the_law(data: st.DataObject, workers: st.SearchStrategy[int]) -> None:
    shards = data.draw(counts, "samples of each shard")
    total = sum(shards)
    batching = {
        "global_batch_size": data.draw(st.integers(1, min(total, 30)), "global batch"),
        "window": data.draw(st.integers(0, 5), "window"),
        "seed": data.draw(st.integers(0, 99), "seed"),
    }
    (whole,) = ranks_of(shards, 1, 0, **batching)
    steps = 2 * whole.steps
    straight = steps_of([whole], steps)
    for epoch in (straight[: whole.steps], straight[whole.steps :]):  # each once, up to the stated tail
        samples = [s for batch in epoch for s in batch.sample_N.tolist()]
        assert len(samples) == len(set(samples)) == total - whole.dropped
        assert whole.dropped == total % batching["global_batch_size"]

    stop = data.draw(st.integers(0, steps), "stopped after")
    world = data.draw(worlds, "ranks")
    before = ranks_of(shards, world, data.draw(workers, "workers"), micro_batch_size=data.draw(micros), **batching)
    assert same(steps_of(before, stop), straight[:stop])
    (state,) = {tuple(rank.state_dict().items()) for rank in before}  # the same on every rank
    after = ranks_of(
        shards, data.draw(worlds, "then"), data.draw(workers), micro_batch_size=data.draw(micros), **batching
    )
    for rank in after:
        rank.load_state_dict(dict(state))
    assert same(steps_of(after, steps - stop), straight[stop:])


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(st.data())
def test_each_sample_once_an_epoch_and_a_resumed_tail_is_the_uninterrupted_one(data):
    check_the_law(data, st.just(0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(st.data())
def test_the_same_with_worker_processes_whose_number_changes_at_the_resume(data):
    check_the_law(data, st.integers(0, 3))


def test_workers_start_once_and_serve_every_epoch():
    (loader,) = ranks_of((20, 20), 1, 2, global_batch_size=8)
    list(loader)
    (first,) = [w._loader._iterator._workers for w in [loader.workers]]
    pids = [process.pid for process in first]
    list(loader)
    list(loader.population_batches(16))
    assert [process.pid for process in loader.workers._loader._iterator._workers] == pids


def test_whoever_counts_the_batches_keeps_no_worker_busy():
    """Lightning knows how many there are and never asks for the end."""
    (loader,) = ranks_of((20, 20), 1, 1, global_batch_size=8)
    epoch = iter(loader)
    for _ in range(len(loader)):
        next(epoch)
    (pid,) = [process.pid for process in loader.workers._loader._iterator._workers]
    assert len(list(loader.population_batches(16))) == 2
    assert [process.pid for process in loader.workers._loader._iterator._workers] == [pid]
    assert len(multiprocessing.active_children()) == 1
    following = iter(loader)
    next(following)
    epoch.close()  # the former iteration, given up late, frees nothing of this one
    assert loader.workers._running is not None


def test_an_iteration_inside_another_has_processes_of_its_own():
    (loader,) = ranks_of((20, 20), 1, 1, global_batch_size=8)
    (again,) = ranks_of((20, 20), 1, 0, global_batch_size=8)
    expected = list(again)
    for number, batch in enumerate(loader):
        assert same([batch], [expected[number]])
        if number == 2:
            assert len(list(loader.population_batches(16))) == 2


def test_an_iteration_given_up_leaves_nothing_behind():
    (loader,) = ranks_of((20, 20), 1, 2, global_batch_size=8)
    (again,) = ranks_of((20, 20), 1, 0, global_batch_size=8)
    for _ in zip(range(2), loader, strict=False):
        pass
    loader.load_state_dict({"epoch": 0, "sample": 0, "global_batch_size": 8})
    assert same(list(loader), list(again))
