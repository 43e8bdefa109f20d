"""Ranks decide together at the same steps, and a step carries no collective that we did not ask for."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist
from rich.console import Console

from pipeline import run
from pipeline.callbacks import agreement
from pipeline.callbacks.agreement import Agreement
from pipeline.callbacks.preemption import Preemption
from pipeline.config import Config
from pipeline.world import World
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config


def asked(rank: int, world: int, seconds: float) -> list[tuple[int, list[float]]]:
    """What each of 20 steps was told, where rank 1 says 5 after step 7."""
    World.from_environment()
    dist.init_process_group("gloo")
    agreement.SECONDS = seconds
    agree = Agreement()
    agree.begin(timedelta(seconds=30))
    answers = []
    for step in range(1, 21):
        sums = agree.ask([5.0 if rank == 1 and step >= 7 else 0.0, 1.0])
        if sums is not None:
            answers.append((step, sums))
    answers.append((21, agree.settle([float(rank), 0.0])))
    dist.destroy_process_group()
    return answers


def test_all_ranks_hear_the_same_at_the_same_steps():
    first, *others = run_ranks(3, asked, 0.0)
    assert all(other == first for other in others)
    assert [answer for step, answer in first if step <= 7] == [[0, 3]] * 6
    assert [answer for step, answer in first if 8 <= step <= 20] == [[5, 3]] * 13
    assert first[-1] == (21, [3, 0])


def test_fast_steps_are_asked_less_often():
    first, other = run_ranks(2, asked, 0.5)
    assert first == other
    assert len(first) < 5


def deaf(rank: int, world: int) -> int:
    """After thousands of calls, as a long training and a validation make, how many more until a signal is heard."""
    World.from_environment()
    dist.init_process_group("gloo")
    agree = Agreement()
    agree.begin(timedelta(seconds=30))
    for _ in range(3000):
        agree.ask([0.0])
    for number in range(1, 1000):
        sums = agree.ask([float(rank == 1)])
        if sums is not None and sums[0]:
            return number
    return -1


def test_a_signal_is_heard_soon_whatever_went_before():
    first, second = run_ranks(2, deaf)
    assert first == second
    assert 0 < first <= 2 * 200 + 2


def test_a_single_rank_hears_itself_at_once():
    agree = Agreement()
    agree.begin(timedelta(seconds=1))
    assert agree.ask([1.0, 2.0]) == [1.0, 2.0]


READS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")  # of values, by the host
STEPS = 10


class Seen(NamedTuple):
    """What ten steps in the middle of an epoch did, by what torch's profiler saw, in C++ as in Python."""

    collectives: dict[str, int]
    reads: dict[str, int]
    agreements: int  # all-reduces of the agreement
    buckets: int  # of gradients, a step


def counted(rank: int, world: int, settings: Config) -> Seen:
    import torch
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])
    asked: list[int] = []
    buckets: list[int] = []
    all_reduce, ended = dist.all_reduce, Preemption.on_train_batch_end

    def watched(*arguments, **options):
        asked.append(1)
        return all_reduce(*arguments, **options)

    def mark(self, trainer, *arguments):
        ended(self, trainer, *arguments)
        if trainer.global_step == 4:
            asked.clear()
            profiler.start()
        if trainer.global_step == 4 + STEPS:
            profiler.stop()
            buckets.append(len(trainer.strategy.model._get_ddp_logging_data()["bucket_sizes"].split(",")))
            buckets.append(len(asked))

    dist.all_reduce, Preemption.on_train_batch_end = watched, mark
    run.train(settings, World.from_environment(), Console(quiet=True))
    events = Counter(event.name for event in profiler.events())
    assert events["aten::convolution"] > STEPS  # it has seen the training
    assert torch.is_grad_enabled()
    return Seen(
        {name: count for name, count in events.items() if name.startswith("c10d::")},
        {name: events[name] for name in READS if events[name]},
        buckets[1],
        buckets[0],
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("model", "exchanges"), [("inception", 0), ("bn_inception", 33 + 33)])
def test_a_step_of_the_whole_trainer_has_its_exchanges_and_gradients_and_nothing_else(
    shards: Path, tmp_path: Path, model: str, exchanges: int
):
    """Lightning's broadcast of a flag before every batch would be seen, DDP's buckets are, and any wait for a value."""
    settings = config(shards, tmp_path, f"counted-{model}", 2, f"model.name={model}", "data.global_batch_size=8",
                      "trainer.max_epochs=1", "tracking.every_steps=1000", "norm.precise_images=0",
                      "trainer.checkpoint_every_steps=0")  # fmt: skip
    for seen in run_ranks(2, counted, settings):
        assert seen.agreements <= STEPS
        gradients = STEPS * seen.buckets
        between = {"c10d::send": STEPS * exchanges, "c10d::recv_": STEPS * exchanges} if exchanges else {}
        assert seen.collectives == {"c10d::allreduce_": gradients + seen.agreements, **between}
        assert seen.reads == {}
