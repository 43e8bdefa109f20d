import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.callbacks.stragglers import Times
from pipeline.callbacks.throughput import Spent, Throughput
from pipeline.launch.pulse import Pulse
from pipeline.norm.waiting import STATISTICS, Waiting
from tests.multiprocess.ranks import run_ranks, with_group

CPU = torch.device("cpu")


class Loop:
    """A training that does nothing but take its time, hook by hook as Lightning calls them."""

    def __init__(self, step: int = 0):
        self.pulse = Pulse()
        self.throughput = Throughput(self.pulse, every_steps=1)
        self.trainer = SimpleNamespace(global_step=step)
        self.throughput.on_train_start(self.trainer, SimpleNamespace(device=CPU, parameters=lambda: iter(())))
        self.pulse.move("loading")

    def step(self, *, wait: float, exchange: float = 0.0, work: float = 0.01) -> None:
        time.sleep(wait)
        self.throughput.on_train_batch_start(self.trainer, None, None, 0)
        self.pulse.move("forward")
        mark = STATISTICS.begin(CPU)
        time.sleep(exchange)
        STATISTICS.end(mark)
        self.pulse.move("backward")
        time.sleep(work)
        self.pulse.move("gradients")
        time.sleep(0.02)
        self.pulse.move("optimizer")
        self.trainer.global_step += 1
        self.throughput.on_train_batch_end(self.trainer, None, None, None, 0)

    def spend(self, phase: str, seconds: float) -> None:
        self.pulse.move(phase)
        time.sleep(seconds)
        self.pulse.move("loading")


def test_an_interval_knows_what_its_time_went_into():
    loop = Loop(step=100)
    began = time.monotonic()
    for _ in range(5):
        loop.step(wait=0.03, exchange=0.01)
        loop.pulse.move("loading")
    loop.spend("checkpoint", 0.05)
    spent = loop.throughput.interval(CPU)
    assert spent.span == pytest.approx(time.monotonic() - began, abs=0.05)
    assert spent.data >= 0.15
    assert spent.checkpoint >= 0.05
    assert spent.gradients >= 0.1
    assert spent.statistics >= 0.05
    assert spent.step >= spent.gradients + spent.statistics + 0.05
    assert loop.throughput.interval(CPU).span < 0.05  # the next one begins anew


def test_a_validation_belongs_to_no_interval():
    loop = Loop()
    loop.step(wait=0.0)
    loop.spend("statistics", 0.1)
    loop.spend("validation", 0.2)
    assert loop.throughput.validation() >= 0.3
    assert loop.throughput.validation() < 0.05
    assert loop.throughput.interval(CPU).span < 0.2


def test_an_interval_that_a_checkpoint_cuts_is_as_long_as_one_that_it_does_not():
    first = Loop()
    first.step(wait=0.05, exchange=0.03)
    carried = first.throughput.open_interval(CPU)
    assert carried.data >= 0.05
    assert carried.statistics >= 0.03
    later = Loop(step=1)
    later.throughput.load(carried)
    later.step(wait=0.05, exchange=0.03)
    both = later.throughput.interval(CPU)
    assert both.data >= 0.1
    assert both.statistics >= 0.06
    first.step(wait=0.0)  # that one goes on, and has lost nothing by being asked
    assert first.throughput.interval(CPU).data >= 0.05


def test_a_ranks_own_time_is_a_step_without_its_waits_and_of_this_start_alone():
    loop = Loop()
    loop.throughput.load(Spent(step=100.0, data=50.0))  # of an earlier start
    for _ in range(3):
        loop.step(wait=0.02, exchange=0.2, work=0.04)
        loop.pulse.move("loading")
    assert loop.throughput.interval(CPU).step > 100
    (rank,) = loop.throughput.by_rank
    assert loop.throughput.steps == 3
    assert 3 * 0.04 <= rank.own < 3 * 0.2
    assert 3 * 0.02 <= rank.data < 50


def three_ranks(rank: int, world: int) -> list[Times]:
    pulse = Pulse()
    throughput = Throughput(pulse, every_steps=1, rank=rank, world=world)
    pulse.move("loading")
    time.sleep(0.1 * (rank == 1))
    pulse.move("forward")
    time.sleep(0.1 * (rank == 2))
    pulse.move("checkpoint")
    throughput.interval(CPU)
    return throughput.by_rank


def test_every_rank_knows_the_times_of_all():
    found = run_ranks(3, with_group, three_ranks)
    assert found[0] == found[1] == found[2]
    assert [int(times.own / 0.1) for times in found[0]] == [0, 0, 1]
    assert [int(times.data / 0.1) for times in found[0]] == [0, 1, 0]


def test_waiting_counts_while_it_is_on_and_once():
    waiting = Waiting()
    mark = waiting.begin(CPU)
    waiting.end(mark)
    assert mark is None
    waiting.on = True
    mark = waiting.begin(CPU)
    time.sleep(0.02)
    waiting.end(mark)
    assert waiting.taken() >= 0.02
    assert waiting.taken() == 0.0


def test_stretches_of_time_add_up():
    assert (Spent(1, 0.25, 0.5, 2, 3) + Spent(1, 0, 0, 1, 0)).span == 8


def test_gradients_are_waited_for_after_the_last_micro_batch_alone():
    loop = Loop()
    loop.throughput._gradients.on = True
    parameter = torch.zeros(1)
    loop.throughput._gradients_are_there(parameter)
    time.sleep(0.2)  # the next micro-batch
    loop.throughput._gradients_are_there(parameter)
    time.sleep(0.02)
    loop.throughput.on_before_optimizer_step(None, None, None)
    assert 0.02 <= loop.throughput._gradients.taken() < 0.2
