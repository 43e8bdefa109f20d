"""Contenders in turn: a process each, one at a time, round after round, so that a drifting machine drifts for all.

What counts is CPU time of the process, its threads and its children, from the end of one round to the end of the
next: what a contender prepares between rounds is paid by the round that uses it.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

Task = TypeVar("Task")
Work = Callable[[int], int]  # does round `number` and returns how many images it was
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Round(NamedTuple):
    images: int
    cpu: float  # seconds
    wall: float  # seconds


@dataclass(frozen=True, slots=True)
class Contender(Generic[Task]):
    """what: all that it does. prepare: imports, opens, and returns its work. peer: somebody else's, as packaged."""

    name: str
    what: str
    prepare: Callable[[Task], Work]
    peer: bool = True


@dataclass(slots=True)
class Row:
    """What one contender did; where it did nothing, missing says why."""

    name: str
    what: str
    peer: bool
    rounds: list[Round] = field(default_factory=list)
    missing: str = ""

    @property
    def rates(self) -> list[float]:
        """Images per CPU second, a number a round."""
        return [r.images / r.cpu for r in self.rounds]

    @property
    def wall_rate(self) -> float:
        """Images per second of the clock, the median."""
        return statistics.median(r.images / r.wall for r in self.rounds)


def measured(
    contenders: Sequence[Contender[Task]],
    task: Task,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """A row a contender, each of `rounds` rounds after one that does not count. One that fails is a row, too."""
    rows = [Row(c.name, c.what, c.peer) for c in contenders]
    with ExitStack() as stack:
        seats = []
        for contender, row in zip(contenders, rows, strict=True):
            connection = stack.enter_context(_process(contender.prepare, task))
            _ask(connection, 0, row)
            row.rounds.clear()
            seats.append((connection, row))
            progress(len(seats), len(rows) * (rounds + 1))
        for number in range(1, rounds + 1):
            for place, (connection, row) in enumerate(seats, 1):
                if not row.missing:
                    _ask(connection, number, row)
                progress(number * len(rows) + place, len(rows) * (rounds + 1))
    return rows


def ratios(row: Row, other: Row) -> list[float]:
    """How many times the other's images per CPU second, round by round: what both met at about the same time."""
    return [mine / theirs for mine, theirs in zip(row.rates, other.rates, strict=True)]


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest of others' rows, by its median."""
    return max((r for r in rows if r.peer and r.rounds), key=lambda r: statistics.median(r.rates), default=None)


def machine() -> str:
    """Cores, processor, load and Python: what a time depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"


def versions(names: Sequence[str]) -> str:
    """Those of the named distributions that are installed."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


@contextmanager
def _process(prepare: Callable[[Task], Work], task: Task) -> Iterator[Connection]:
    # spawn: a fork would share the parent's thread pools and imports.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, prepare, task), daemon=True)
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # read when a library loads, so before the process begins
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(timeout=20)
        process.kill()


def _ask(connection: Connection, number: int, row: Row) -> None:
    try:
        connection.send(number)
        answer: Round | str = connection.recv()
    except (EOFError, OSError):
        answer = "its process died"
    if isinstance(answer, str):
        row.missing = answer
        row.rounds.clear()
    else:
        row.rounds.append(answer)


def _serve(connection: Connection, prepare: Callable[[Task], Work], task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, whose end of the pipe then closes
    warnings.simplefilter("ignore")  # peers on peers
    torch.set_num_threads(1)
    work: Work | None = None
    before = _cpu_seconds()
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        try:
            begin = time.perf_counter()
            work = work or prepare(task)
            images = work(number)
            wall, now = time.perf_counter() - begin, _cpu_seconds()
            connection.send(Round(images, now - before, wall))
            before = now
        except ImportError as error:
            connection.send(f"not installed ({error.name or error})")
        except Exception as error:
            connection.send(f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)
