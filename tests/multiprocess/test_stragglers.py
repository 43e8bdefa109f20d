"""Two nodes of which one is slower by a fifth: what both do is on record, and who holds up the run is named."""

import csv
import os
import time
from pathlib import Path

import lightning
import pytest
from rich.console import Console

from pipeline import run
from pipeline.callbacks.journal import read_journal
from pipeline.callbacks.stragglers import MOST
from pipeline.callbacks.throughput import Throughput
from pipeline.config import Config
from pipeline.norm.waiting import STATISTICS
from pipeline.report.making import make_report
from pipeline.world import World
from tests.callbacks.wandb_server import WandbServer
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config

EVERY, LOOKS = 5, 24


class Device(lightning.Callback):
    """Work that takes no processor of this machine, as a GPU's: other work on it would drown a fifth of what does."""

    def on_before_backward(self, *_):
        time.sleep(0.06)


class Slower(lightning.Callback):
    """Sleeps in each step for a part of the own time of the step before: by the clock, waiting for others left out."""

    def __init__(self, part: float):
        self.part, self._own, self._before = part, 0.0, 0.0

    def on_train_batch_start(self, trainer, *_):
        self._before = self._clock(trainer)

    def on_before_backward(self, *_):
        time.sleep(self.part * self._own)

    def on_before_optimizer_step(self, trainer, *_):
        self._own = self._clock(trainer) - self._before - self.part * self._own

    def _clock(self, trainer) -> float:
        """Seconds that stand still while this rank waits."""
        (throughput,) = (each for each in trainer.callbacks if isinstance(each, Throughput))
        return time.perf_counter() - STATISTICS._seconds - throughput.pulse.spent()["gradients"]


class Late(lightning.Callback):
    """The next batch takes 30 ms longer to come."""

    def on_train_batch_end(self, *_):
        time.sleep(0.03)


def train_node(
    rank: int, world: int, settings: Config, slow: int, watcher: lightning.Callback, environment: dict[str, str]
) -> str:
    """The one rank of a node, with the watcher where it is to be slow; returns what it said."""
    os.environ.update({**environment, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)})
    watchers = [Device(), watcher] if rank == slow else [Device()]
    with (settings.directory / f"said-{rank}").open("w+") as file:
        run.train(settings, World.from_environment(), Console(file=file), watchers)
        file.seek(0)
        return file.read()


def of_two_nodes(shards: Path, directory: Path, *words: str) -> Config:
    return config(shards, directory, "run", 1, "cluster.nodes=2", f"tracking.every_steps={EVERY}", "ledger=false",
                  "trainer.validate_every_epochs=0", f"trainer.max_epochs={EVERY * LOOKS // 5}",
                  "trainer.checkpoint_every_steps=0", "norm.precise_images=0",
                  "recipe=mlp_sigmoid_bn", *words)  # fmt: skip


@pytest.mark.parametrize(
    ("slow", "words"),
    [
        (1, ()),
        pytest.param(0, (), marks=pytest.mark.slow),
        pytest.param(-1, (), marks=pytest.mark.slow),
        pytest.param(1, ("norm.group_size=1",), marks=pytest.mark.slow),  # ranks meet in gradients alone
        pytest.param(1, ("data.micro_batch_size=8",), marks=pytest.mark.slow),
    ],
)
def test_both_nodes_are_on_record_and_the_slower_rank_is_named(
    shards: Path, tmp_path: Path, slow: int, words: tuple[str, ...]
) -> None:
    settings = of_two_nodes(shards, tmp_path, "tracking.mode=online", "tracking.system_every_seconds=1", *words)
    with WandbServer() as server:
        said = run_ranks(2, train_node, settings, slow, Slower(0.2), server.environment)
        server.until(LOOKS)
        history = server.run.history
    rows = [row for row in read_journal(settings.directory / "metrics.csv") if row.split == "train"]
    assert len(rows) == LOOKS
    assert {row.slowest_rank for row in rows[: MOST - 1]} == {None}
    assert {row.slowest_rank for row in rows[MOST - 1 :]} - {None} == ({slow} if slow >= 0 else set())
    named = [line for line in history if "train/slowest_rank" in line]
    assert {line["train/slowest_rank"] for line in named} == ({slow} if slow >= 0 else set())
    assert (f"rank {slow} (node {slow}, " in said[0]) == (slow >= 0)
    if slow >= 0:
        assert 1.1 < rows[-1].slowest_over_median < 1.35

    page = make_report([settings.directory]).read_text()
    assert (f"rank {slow} (node {slow}, " in page) == (slow >= 0)
    assert "Own time in steps, rank by rank" in page
    assert ">node 1</span>" in page
    for node in (0, 1):
        with (settings.directory / "system" / f"node-{node}.csv").open() as file:
            samples = list(csv.DictReader(file))
        assert len(samples) >= 2
        assert all(0 <= float(each["cpu"]) <= 1 and float(each["memory_used_gb"]) > 0 for each in samples)
        sent = [line[f"system/cpu/node-{node}"] for line in history if f"system/cpu/node-{node}" in line]
        assert len(sent) >= 2
        assert set(sent) <= {float(each["cpu"]) for each in samples}


@pytest.mark.slow
def test_a_rank_whose_data_comes_late_is_named_and_not_for_its_own_time(shards: Path, tmp_path: Path) -> None:
    settings = of_two_nodes(shards, tmp_path)
    (said, _) = run_ranks(2, train_node, settings, 1, Late(), {})
    rows = [row for row in read_journal(settings.directory / "metrics.csv") if row.split == "train"]
    assert rows[-1].slowest_data_rank == 1
    assert {row.slowest_rank for row in rows} == {None}
    assert "rank 1 (node 1, " in said
