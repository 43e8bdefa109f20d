"""Ranks of a run's copy, forked from a server that has imported everything, so that a start takes a second.

They run what `pipeline train RUN/config.yaml` runs.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning
from rich.console import Console

from pipeline import run
from pipeline.callbacks.preemption import InterruptedRunError
from pipeline.launch.lock import locked
from pipeline.launch.plan import CONFIG, RECORD
from pipeline.launch.pulse import PULSES
from pipeline.world import World

RESUMABLE = 75
Watchers = Callable[[], Sequence[lightning.Callback]]


def nobody() -> Sequence[lightning.Callback]:
    """No callbacks but the run's own."""
    return ()


def copied(frozen: Path, to: Path) -> Path:
    """A new directory with the config of a run, and nothing of what it has done."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name in (CONFIG, RECORD):
        shutil.copyfile(frozen / name, to / name)
    return to


def started(directory: Path, world: int, overrides: Sequence[str], watchers: Watchers = nobody) -> list[BaseProcess]:
    """Start the ranks. watchers: called in each of them for callbacks that watch the training."""
    shutil.rmtree(directory / "pulses", ignore_errors=True)
    (directory / "pulses").mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(directory, rank, world, port, overrides, watchers)) for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _rank(directory: Path, rank: int, world: int, port: int, overrides: Sequence[str], watchers: Watchers) -> None:
    """One rank of a start; exits as the command line does."""
    os.environ[PULSES] = str(directory / "pulses")
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WANDB_SILENT="true", TORCH_CPP_LOG_LEVEL="ERROR",
    )  # fmt: skip
    log = (directory / f"rank-{rank}.log").open("a")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    world_here = World.from_environment()
    try:
        if rank:
            run.go_on(directory, world_here, Console(quiet=True), overrides, watchers())
        else:
            with locked(directory):
                run.go_on(directory, world_here, Console(file=log), overrides, watchers())
    except InterruptedRunError:
        sys.exit(RESUMABLE)
