"""Slurm, where this machine can submit to it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.doctor.findings import Finding, fault, of_message, ok, warning
from pipeline.launch import queue
from pipeline.launch.slurm import SCRIPT

Run = Callable[[Sequence[str]], str]
_SECONDS = 5.0  # for Slurm to say whether it would take a job
_ANSWER = re.compile(r"to start at (\S+)(.*)")  # "sbatch: Job 7 to start at TIME using 8 processors on nodes ..."


def run(command: Sequence[str], seconds: float = 5.0) -> str:
    """What a command prints. Raises OSError or subprocess.SubprocessError."""
    return subprocess.run(list(command), capture_output=True, text=True, timeout=seconds, check=True).stdout.strip()


def check_submission(wanted: bool, run: Run = run) -> Iterator[Finding]:
    """Version and partitions.

    wanted: the run is to go through Slurm; where it is not, a fault of Slurm's is worth a warning.
    """
    try:
        version = run(["sbatch", "--version"])
        partitions = [line.split() for line in run(["sinfo", "--noheader", "--format=%P %a %D"]).splitlines()]
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or "").strip().splitlines()
        make = fault if wanted else warning
        yield make("Slurm", f"sbatch is here, but Slurm does not answer ({said[0] if said else error})",
                    "try `sinfo`; ask who runs the cluster whether its controller is up")  # fmt: skip
        return
    up = [f"{name} ({nodes} nodes)" for name, state, nodes in partitions if state == "up"]
    if up:
        yield ok("Slurm", f"{version}; partitions {', '.join(up)}")
    else:
        yield warning("Slurm", f"{version}; none of {len(partitions)} partitions is up", "see `sinfo`")


def absent() -> Iterator[Finding]:
    yield warning("Slurm", "sbatch is not found on this machine: nobody was asked whether the job would be taken",
                  "look, and launch, where Slurm's commands are")  # fmt: skip


def check_job(script: str, scratch: Path, asked: Callable[[Path, float], str] = queue.tested) -> Iterator[Finding]:
    """What Slurm says of the script, which is not submitted. scratch: a directory to write it into."""
    path = scratch / SCRIPT
    path.write_text(script)
    try:
        said = asked(path, _SECONDS)
    except queue.QueueError as error:
        yield of_message("job", error)
        return
    start = _ANSWER.search(said)
    yield ok("job", f"Slurm would take it: it could start at {start[1]}{start[2]}" if start else
             f"Slurm would take it: {said}")  # fmt: skip
