"""Slurm's queue, through its own commands: submit a script, ask how jobs stand, cancel them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_SECONDS = 60.0  # that Slurm's controller may take to answer
_OURS = ("PIPELINE_ORIGIN", "PIPELINE_SLURM", "PIPELINE_CODE", "PIPELINE_HOSTS", "PIPELINE_REPORT")


class QueueError(Exception):
    """Slurm did not do what it was asked: the message is its own, and names the way out."""


def is_there() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def submit(script: Path) -> str:
    """Submit it; returns the job's id. Raises QueueError."""
    # "id" or "id;cluster"
    return _asked("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def tested(script: Path, seconds: float) -> str:
    """What Slurm says of a script that is not submitted: when it could start, and where. Raises QueueError."""
    return _asked("sbatch", "--test-only", str(script), seconds=seconds).strip()


def states(jobs: Sequence[str]) -> dict[str, str]:
    """Of those that are in the queue: state, time, and nodes or reason. A job that has left it is not among them."""
    if not jobs or shutil.which("squeue") is None:
        return {}
    try:
        said = _asked("squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%i|%T|%M|%R")
    except QueueError as error:
        if "Invalid job id" in str(error):  # the only one, and long gone
            return {}
        raise
    rows = [line.split("|", 3) for line in said.splitlines() if line.count("|") >= 3]
    return {job: f"{state} {time} {where}" for job, state, time, where in rows if job in jobs}


def cancel(jobs: Sequence[str]) -> None:
    """End them: their ranks get SIGTERM, and time to save. Raises QueueError."""
    _asked("scancel", *jobs)


def follow(job: str, log: Path, out: TextIO, seconds: float = 1.0) -> None:
    """Show what a job prints until it has left the queue; on stderr, what it waits for. Raises QueueError."""
    shown, before = 0, ""
    while True:
        state = states([job]).get(job, "")
        with suppress(FileNotFoundError), log.open("rb") as file:
            file.seek(shown)
            print(file.read().decode(errors="replace"), end="", file=out, flush=True)
            shown = file.tell()
        if not state:
            return
        word, _, reason = state.split(" ", 2)
        if word == "PENDING" and reason != before:
            print(f"job {job} waits {reason}", file=sys.stderr)
        before = reason
        time.sleep(seconds)


def _asked(*command: str, seconds: float = _SECONDS) -> str:
    # Inside another job, its variables would be taken for options of this one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OURS and (name == "SLURM_CONF" or not name.startswith("SLURM_"))
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )  # fmt: skip
    except FileNotFoundError:
        raise QueueError(
            f"{command[0]} is not found: launch where Slurm's commands are, or look at the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{command[0]} has not answered for {seconds:.0f} s; try again later") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"code {done.returncode}"]
        raise QueueError(f"{', '.join(said)}; change the keys of slurm.* that it speaks of, or try again later")
    return done.stdout or done.stderr  # --test-only speaks on the other one
