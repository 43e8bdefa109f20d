"""Several processes of a run on this machine: started together, signalled together, ended together."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LAUNCHER = "PIPELINE_LAUNCHER"  # set for our ranks: the run's directory is held by the process that started them
_GRACE_SECONDS = 15.0  # what the others get to notice that one has died
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
RESUMABLE = 75
EXPLAINED = (2, 3)  # bad config, bad data
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run_processes(
    arguments: Sequence[str], *, processes: int, threads: int, logs: Path, lead_seconds: float = 120.0
) -> int:
    """Run `python -m pipeline ARGUMENTS` once a rank; returns the exit status of the run.

    Rank 0 keeps the terminal, the others write to logs/rank-<r>.log. SIGTERM, SIGINT and SIGUSR2 go
    to all; after lead_seconds they are killed. When one rank fails the others are ended, and its status
    is the run's; 75 of any rank means interrupted and resumable, if none failed otherwise.
    """
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipeline", *arguments]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads), LAUNCHER: "local",
    }  # fmt: skip
    # Torch would warn on every rank that all parameters are used, which is why run.py looks for unused ones.
    shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(processes):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = None if rank == 0 else (logs / f"rank-{rank}.log").open("ab")
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
    return _wait(ranks, logs, lead_seconds)


def _wait(ranks: list[subprocess.Popen[bytes]], logs: Path, lead_seconds: float) -> int:
    deadline, signalled = float("inf"), False

    def forward(number: int, frame: object) -> None:
        nonlocal deadline, signalled
        deadline, signalled = min(deadline, time.monotonic() + lead_seconds), True
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    failed: int | None = None
    try:
        while any(process.poll() is None for process in ranks):
            time.sleep(0.05)
            if failed is None and (failed := _failure(ranks, signalled=signalled)) is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            elif any(process.poll() == RESUMABLE for process in ranks):
                deadline = min(deadline, time.monotonic() + lead_seconds)  # ranks are interrupted together
            if time.monotonic() > deadline:
                for process in ranks:
                    process.kill()
        # Of several failures, one that knew why: the others lose their connection to it and fail in turn.
        explained = [rank for rank, process in enumerate(ranks) if process.returncode in EXPLAINED]
        failed = explained[0] if explained else _failure(ranks, signalled=signalled) if failed is None else failed
        if failed is None:
            return RESUMABLE if any(process.returncode for process in ranks) else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in ranks:
            if process.poll() is None:
                process.kill()
    if failed:  # rank 0 has said on the terminal what went wrong
        print(f"rank {failed} ended first; the end of {logs / f'rank-{failed}.log'}:", file=sys.stderr)
        print(_tail(logs / f"rank-{failed}.log"), file=sys.stderr)
    return max(ranks[failed].returncode, 1)


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
