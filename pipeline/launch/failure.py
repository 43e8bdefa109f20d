"""How a failed run ends: one line that names what failed, and an exit code that says whether to go on.

A rank that knows why leaves its verdict where our launcher looks, the first one counts; the launcher says it once.
In a Slurm job it leaves its code where the job script looks.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.launch.pulse import PULSES, Place

AGAIN, NOT_AGAIN = 75, 1  # the same command goes on; it would end there again
KEYS_SHOWN = 8
CODE = "PIPELINE_CODE"  # set by our job script: the file for the code of the first rank that ends otherwise than done
_VERDICT = "verdict"
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

NameSamples = Callable[[int, int, int], list[str]]  # keys of (rank, epoch, number of the micro-batch)


class FailedRunError(Exception):
    """The run failed in a way that is known. shared: every rank raises the same. restart: go on by itself at once."""

    def __init__(self, message: str, *, code: int = NOT_AGAIN, shared: bool = False, restart: bool = False):
        super().__init__(message)
        self.code, self.shared, self.restart = code, shared, restart


def leave_verdict(failure: FailedRunError) -> bool:
    """Hand it to our launcher; False where there is none, and the caller says it."""
    leave_code(failure.code)
    directory = os.environ.get(PULSES)
    if directory is None:
        return False
    verdict = Path(directory) / _VERDICT
    mine = verdict.with_name(f"{_VERDICT}.{os.getpid()}.{threading.get_ident()}")
    content = {"message": str(failure), "code": failure.code, "restart": failure.restart}
    try:
        mine.write_text(json.dumps(content))
        os.link(mine, verdict)  # whole or not at all, and only the first
    except OSError:
        pass
    mine.unlink(missing_ok=True)
    return True


def leave_code(code: int) -> int:
    """Hand it to our job script, if there is one; returns the code to exit with.

    That is 0 for an interruption: at any other code srun kills the other ranks, of which one may still be saving.
    """
    path = os.environ.get(CODE)
    if path is None or code == 0:
        return code
    try:
        with Path(path).open("x") as file:
            file.write(str(code))
    except FileExistsError:
        pass  # another rank was first
    except OSError:
        return code  # srun hands it on, or the code of a rank that it killed for this one
    return 0 if code == AGAIN else code


def read_verdict(directory: Path) -> FailedRunError | None:
    """What a rank has left there."""
    try:
        content = json.loads((directory / _VERDICT).read_text())
    except FileNotFoundError:
        return None
    return FailedRunError(content["message"], code=content["code"], restart=content["restart"])


def death(rank: int, world: int, host: str, code: int, place: Place | None, name: NameSamples) -> FailedRunError:
    """What to say of a rank that was ended by a signal (a negative code)."""
    number = -code
    try:
        kind = signal.Signals(number).name
    except ValueError:
        kind = "unknown"
    text = f"rank {rank} of {world} on {host} was killed by signal {number} ({kind})"
    if place is not None:
        text += f" {where_in_run(place, name, rank)}"
    if number == signal.SIGKILL:
        text += "; if nobody did that, the memory ran out: lower cluster.workers or data.micro_batch_size"
    if number == signal.SIGBUS:
        text += "; that is what a full /dev/shm does: enlarge it, or lower cluster.workers"
    return FailedRunError(text, code=AGAIN if number in _FROM_OUTSIDE else NOT_AGAIN)


def where_in_run(place: Place, name: NameSamples, rank: int) -> str:
    """Step, phase and samples of a place, for messages."""
    if place.phase in ("start", "end"):
        return f"at the {place.phase}"
    keys = "" if place.phase not in _WITH_BATCH else f", samples {shown(name(rank, place.epoch, place.number))}"
    return f"in step {place.step} (epoch {place.epoch + 1}, {place.phase}{keys})"


def shown(keys: Sequence[str]) -> str:
    """The first keys, and how many more there are."""
    more = len(keys) - KEYS_SHOWN
    return ", ".join(keys[:KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "") if keys else "none"


_WITH_BATCH = ("loading", "forward", "backward", "gradients", "optimizer")
