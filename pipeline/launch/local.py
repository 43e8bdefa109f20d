"""Several processes of a run on this machine: started together, signalled together, ended together."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.launch.failure import FailedRunError, NameSamples, death, read_verdict, where_in_run
from pipeline.launch.pulse import PULSES, read_place

LAUNCHER = "PIPELINE_LAUNCHER"  # set for our ranks: the run's directory is held by the process that started them
_GRACE_SECONDS = 15.0  # what the others get to notice that one has died
_KILLED_GRACE_SECONDS = 3.0  # the same where it was killed, and after a second Ctrl-C: no rank can tell more
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
RESUMABLE = 75
EXPLAINED = (2, 3)  # bad config, bad data
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run_processes(
    arguments: Sequence[str],
    *,
    processes: int,
    threads: int,
    logs: Path,
    lead_seconds: float = 120.0,
    node: int = 0,
    nodes: int = 1,
    name: NameSamples = lambda rank, epoch, number: [],
) -> int:
    """Run `python -m pipeline ARGUMENTS` once a rank of this node; returns the exit status of the run.

    The node's first rank keeps the terminal, the others write to logs/rank-<r>.log. SIGTERM, SIGINT and SIGUSR2 go
    to all; after lead_seconds, or soon after a second SIGINT, they are killed. When one rank fails the
    others are ended, and its status is the run's; 75 of any rank means interrupted and resumable, if none
    failed otherwise.

    node, nodes: of several, each of which does this, with MASTER_ADDR and MASTER_PORT of the first in its environment.
    name: keys of a rank's samples. Raises FailedRunError where a rank said why the run failed, or a signal ended one.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pipeline-", ignore_cleanup_errors=True) as pulses:
        ranks = _started(arguments, processes, threads, logs, Path(pulses), node, nodes)
        watch = _Watch(ranks, logs, Path(pulses), name, first=node * processes, world=nodes * processes)
        return watch.wait(lead_seconds)


def _started(
    arguments: Sequence[str], processes: int, threads: int, logs: Path, pulses: Path, node: int, nodes: int
) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    rendezvous = {} if nodes > 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared = {
        **os.environ, **rendezvous, "WORLD_SIZE": str(nodes * processes), "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": str(node), "OMP_NUM_THREADS": str(threads), LAUNCHER: "local",
        PULSES: str(pulses),
    }  # fmt: skip
    # Python's tracker frees what a killed rank and its workers shared, and would warn that it had to.
    shared["PYTHONWARNINGS"] = ",".join(filter(None, [shared.get("PYTHONWARNINGS"), "ignore:resource_tracker"]))
    ranks: list[subprocess.Popen[bytes]] = []
    for local in range(processes):
        rank = node * processes + local
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(local)}
        output = None if local == 0 else (logs / f"rank-{rank}.log").open("ab")
        # A session of its own, so that Ctrl-C reaches a rank once, through us; it still ends if we are killed.
        ranks.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  (see there)
            )
        )
        if output is not None:
            output.close()
    return ranks


class _Watch:
    """Waits for the ranks, and finds out which ended first and why. first: the number of the first of them."""

    def __init__(self, ranks: list[subprocess.Popen[bytes]], logs: Path, pulses: Path, name: NameSamples, *,
                 first: int, world: int):  # fmt: skip
        self.ranks, self.logs, self.pulses, self.name = ranks, logs, pulses, name
        self.first, self.world = first, world
        self.failed: int | None = None  # the place among them of the first that did
        self.verdict: FailedRunError | None = None  # what a rank has said of the run's end
        self.verdict_came_first = False
        self._deadline, self._signalled, self._interrupted = float("inf"), False, False

    def wait(self, lead_seconds: float) -> int:
        def forward(number: int, frame: object) -> None:
            second = number == signal.SIGINT and self._interrupted
            self._until(_KILLED_GRACE_SECONDS if second else lead_seconds)
            self._signalled, self._interrupted = True, number == signal.SIGINT
            for process in self.ranks:
                if process.poll() is None:
                    process.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            while any(process.poll() is None for process in self.ranks):
                time.sleep(0.05)
                self._look(lead_seconds)
                if time.monotonic() > self._deadline:
                    for process in self.ranks:
                        process.kill()
            self._look(lead_seconds)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for process in self.ranks:
                if process.poll() is None:
                    process.kill()
        return self._status()

    def _look(self, lead_seconds: float) -> None:
        """Note the first rank that failed or spoke; ends of others after that follow from it."""
        if self.verdict is None and (verdict := read_verdict(self.pulses)) is not None:
            self.verdict, self.verdict_came_first = verdict, self.failed is None
            self._until(_GRACE_SECONDS)
        if self.failed is None and time.monotonic() < self._deadline:
            self.failed = _failure(self.ranks, signalled=self._signalled)
            if self.failed is not None:
                killed = (self.ranks[self.failed].returncode or 0) < 0
                self._until(_KILLED_GRACE_SECONDS if killed else _GRACE_SECONDS)
            elif any(process.poll() == RESUMABLE for process in self.ranks):
                self._until(lead_seconds)  # ranks are interrupted together

    def _until(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _status(self) -> int:
        """Of several failures, one that knew why: the others lose their connection to it and fail in turn."""
        explained = [place for place, process in enumerate(self.ranks) if process.returncode in EXPLAINED]
        failed = explained[0] if explained else self.failed
        code = 0 if failed is None else self.ranks[failed].returncode
        if self.verdict is not None and not explained and (self.verdict_came_first or code == self.verdict.code):
            raise self.verdict
        if failed is None:
            return RESUMABLE if any(process.returncode for process in self.ranks) else 0
        rank = self.first + failed
        place = read_place(self.pulses / f"rank-{rank}")
        if code < 0:
            raise death(rank, self.world, socket.gethostname(), code, place, self.name)
        if failed:  # the first has said on the terminal what went wrong
            where = f" {where_in_run(place, self.name, rank)}" if place is not None else ""
            log = self.logs / f"rank-{rank}.log"
            print(f"rank {rank} ended first{where}; the end of {log}:", file=sys.stderr)
            print(_tail(log), file=sys.stderr)
        return max(code, 1)


def _failure(ranks: list[subprocess.Popen[bytes]], *, signalled: bool) -> int | None:
    """A rank that ended otherwise than done or resumable; after a signal of ours, dying of it counts as resumable."""
    accepted = {None, 0, RESUMABLE, *(-number for number in FORWARDED if signalled)}
    return next((rank for rank, process in enumerate(ranks) if process.poll() not in accepted), None)


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In the child: ask Linux for SIGTERM when the launcher is gone, so that nothing trains on unseen.

    A launcher that has read a remote manifest has threads, whose locks the child may find taken for ever: it runs no
    more than this one call before it becomes a process of its own, and loads no library.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
