"""Slurm, where this machine can submit to it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence

from pipeline.doctor.findings import Finding, fault, ok, warning

Run = Callable[[Sequence[str]], str]


def run(command: Sequence[str], seconds: float = 5.0) -> str:
    """What a command prints. Raises OSError or subprocess.SubprocessError."""
    return subprocess.run(list(command), capture_output=True, text=True, timeout=seconds, check=True).stdout.strip()


def check_submission(wanted: bool, run: Run = run) -> Iterator[Finding]:
    """Version and partitions. The place for `sbatch --test-only` of a rendered script, by the same `run`.

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
