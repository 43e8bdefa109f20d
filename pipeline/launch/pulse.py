"""Where a rank stands, in a few bytes that outlive it.

The training writes its place into mapped memory when it moves: no call, no lock, and a reader in
another process still finds it after SIGKILL. It also keeps how long each phase has taken.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

# In the order of a step. gradients: all of this rank's are there, and those of the others are waited for.
PHASES = (
    "start", "loading", "forward", "backward", "gradients", "optimizer", "statistics", "validation", "checkpoint",
    "end",
)  # fmt: skip
PULSES = "PIPELINE_PULSES"  # set for our ranks: the directory of this node in which they leave pulse and verdict
_FORM = struct.Struct("=qqqqq")


class Place(NamedTuple):
    """moves: how often the rank has moved. step: counted from 1. number: of the micro-batch in the epoch (from 0)."""

    moves: int = 0
    phase: str = "start"
    step: int = 0
    epoch: int = 0
    number: int = 0


class Pulse:
    """This rank's place. path: a file that others may read, or None."""

    def __init__(self, path: Path | None = None):
        self.place = Place()
        self.longest = dict.fromkeys(PHASES, 0.0)  # seconds between two moves, by the phase they were spent in
        self.seen = dict.fromkeys(PHASES, 0)
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._moved_at = time.monotonic()
        if path is None:
            self._memory = mmap.mmap(-1, _FORM.size)
            return
        with path.open("w+b") as file:
            file.truncate(_FORM.size)
            self._memory = mmap.mmap(file.fileno(), _FORM.size)

    def move(self, phase: str, step: int | None = None, epoch: int | None = None, number: int | None = None) -> None:
        """The training goes on to this phase; what is not given stays."""
        old, now = self.place, time.monotonic()
        self.longest[old.phase] = max(self.longest[old.phase], now - self._moved_at)
        self._spent[old.phase] += now - self._moved_at
        self.seen[old.phase] += 1
        self._moved_at = now
        self.place = Place(
            old.moves + 1, phase, old.step if step is None else step, old.epoch if epoch is None else epoch,
            old.number if number is None else number,
        )  # fmt: skip
        _FORM.pack_into(self._memory, 0, self.place.moves, PHASES.index(phase), *self.place[2:])

    def spent(self) -> dict[str, float]:
        """Seconds in each phase up to now, the one that lasts included."""
        spent = dict(self._spent)
        spent[self.place.phase] += time.monotonic() - self._moved_at
        return spent


def read_place(path: Path) -> Place | None:
    """Where a rank stands or stood last; None if it has not begun."""
    try:
        moves, phase, step, epoch, number = _FORM.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    return Place(moves, PHASES[phase], step, epoch, number)


def pulse_path(rank: int, directory: Path | None = None) -> Path | None:
    """Where a rank leaves its pulse for our launcher; None without one."""
    place = directory or os.environ.get(PULSES)
    return Path(place) / f"rank-{rank}" if place else None
