"""SkyPilot, where this machine has it: its command, the bucket of the run, secrets by their names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence

from pipeline.doctor.findings import Finding, ok, warning

_LONG_MINUTES = 5.0  # of training that a machine which is taken away may cost


def check_command() -> Iterator[Finding]:
    if shutil.which("sky"):
        yield ok("SkyPilot", "sky is here; `sky check` says which clouds it may use")
    else:
        yield warning("SkyPilot", "sky is not found on this machine: the task is written, and nobody takes it",
                      "install it in an environment of its own: uv tool install 'skypilot[aws]'")  # fmt: skip


def check_bucket(bucket: str, run_id: str) -> Iterator[Finding]:
    yield ok("bucket", f"the run's directory is {bucket.rstrip('/')}/{run_id or '(its id)'}, mounted on each node")


def check_secrets(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Variables that are handed on by name, or that SkyPilot's server keeps."""
    missing = [name for name in names if not environment.get(name)]
    if missing:
        yield warning("secrets", f"{', '.join(missing)} not set here: SkyPilot's server must keep them",
                      "export them, or see `sky secrets`")  # fmt: skip
    elif names:
        yield ok("secrets", f"{', '.join(names)} handed on by name")


def check_checkpoints(spot: bool, minutes: float, steps: int) -> Iterator[Finding]:
    """How much training a machine that is taken away costs."""
    if spot and not steps and not 0 < minutes <= _LONG_MINUTES:
        yield warning("spot", f"skypilot.spot = true with trainer.checkpoint_every_minutes = {minutes:g}: so much is "
                      "trained again whenever a machine is taken away",
                      "trainer.checkpoint_every_minutes=2")  # fmt: skip
    elif spot:
        often = f"every {minutes:g} minutes" if not steps else f"every {steps} steps"
        yield ok("spot", f"checkpoints {often} are sent to the bucket; a start goes on from the newest there")
