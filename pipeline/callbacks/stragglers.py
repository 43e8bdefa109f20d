"""Which rank holds the others up: its own time a step, and its wait for data, against the middle one of the others.

A step ends for all ranks at once, so its length says nothing. A rank's own time does: the step without what it stands
in collectives, where it is the fast ranks that wait. Every machine has noise; a rank is named when it stands out again
and again. Legend: T looks, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.callbacks.step_table import StepTable

Values = NDArray[np.float64]
FILE, COLUMNS = "ranks.csv", ("step", "rank", "node", "host", "own_s", "data_s")
WINDOW, MOST = 20, 18  # looks that are judged together; in so many of them a rank must be above by NOTABLE
MOST_TIMES = 10.0  # the median's own time that a look may show of a rank
NOTABLE, SLOW = 0.05, 0.10  # in each of those looks; in the middle one
# And in the middle one by so many times how far the looks of one rank lie from their own middle (the median of that):
# 5 standard errors of a median of 20. Of 3,000 windows of 32 ranks whose looks double now and then, each by its own
# chance, none names one; without it 5 do.
NOISE = 2.3


class Times(NamedTuple):
    """Of one rank in one stretch, in seconds. own: in steps, without waiting for others. data: waiting for a batch."""

    own: float
    data: float


class Seat(NamedTuple):
    """Where a rank runs."""

    node: int
    host: str


@dataclass(frozen=True, slots=True)
class Excess:
    """How far each rank is above the middle one of the others, look by look (T, R). own: as a fraction of that one's
    own time. data: of what a step with its wait takes the middle rank, since the wait of others may be nothing.
    """

    own: Values
    data: Values


@dataclass(frozen=True, slots=True)
class Slowest:
    """rank: that stands out, None for none. excess: the most that any rank has in the middle look."""

    rank: int | None
    excess: float


def excess(own_TR: Values, data_TR: Values) -> Excess:
    """Of times a step, of two ranks or more."""
    middle_T1 = np.median(own_TR + data_TR, axis=1, keepdims=True)
    # Waits of one step stand for those of all on a GPU: they may exceed a fast rank's time, and leave nothing of it.
    least_T1 = np.maximum(own_TR.max(axis=1, keepdims=True) / MOST_TIMES, 1e-9)
    return Excess(own_TR / np.maximum(of_the_others(own_TR), least_T1) - 1,
                  (data_TR - of_the_others(data_TR)) / np.maximum(middle_T1, 1e-9))  # fmt: skip


def of_the_others(values_TR: Values) -> Values:
    """For each rank the median over all but itself: of two ranks, a median over both would hide half of a lag."""
    ordered_TR = np.sort(values_TR, axis=1)
    place_TR = np.argsort(np.argsort(values_TR, axis=1, kind="stable"), axis=1, kind="stable")
    others = values_TR.shape[1] - 1

    def nth(number: int) -> Values:
        found: Values = np.take_along_axis(ordered_TR, number + (place_TR <= number), axis=1)
        return found

    return (nth((others - 1) // 2) + nth(others // 2)) / 2


def slowest(excess_TR: Values) -> Slowest:
    """By the last WINDOW of the looks that are given."""
    window = excess_TR[-WINDOW:]
    middle_R = np.median(window, axis=0)
    noise = float(np.median(np.abs(window - middle_R)))
    often_R = (window >= NOTABLE).sum(axis=0) >= MOST
    named = np.flatnonzero((middle_R >= max(SLOW, NOISE * noise)) & often_R)
    return Slowest(int(named[np.argmax(middle_R[named])]) if len(named) else None, float(middle_R.max()))


class Stragglers:
    """A look of the leading rank at all ranks, with each row; ranks.csv has a line for each. Two ranks or more.

    say: told once of a rank that is named.
    """

    def __init__(self, path: Path, *, say: Callable[[str], object] = print):
        self.table, self.say = StepTable(path, COLUMNS), say
        self.seats: Sequence[Seat] = ()
        self._looks: list[Sequence[Times]] = []  # seconds a step, of a window
        self._said: set[tuple[str, int]] = set()

    def begin(self, step: int) -> None:
        """Before the first row. step: that the run goes on from; later looks were undone with their steps."""
        self.table.begin(step)

    def add(self, step: int, steps: int, ranks: Sequence[Times]) -> dict[str, float | None]:
        """What a row at `step` says of the ranks. ranks: their seconds in the `steps` steps of this start since the
        last row.
        """
        counted = max(steps, 1)  # none where a benchmark has stopped the clocks
        look = [Times(own / counted, data / counted) for own, data in ranks]
        self._looks = [*self._looks, look][-WINDOW:]
        self.table.append((step, rank, *self._seat(rank), *times) for rank, times in enumerate(look))
        own_TR, data_TR = np.moveaxis(np.array(self._looks, dtype=np.float64), 2, 0)
        found = excess(own_TR, data_TR)
        by_own, by_data = slowest(found.own), slowest(found.data)
        self._tell(step, "steps", by_own.rank, f"takes {1 + by_own.excess:.2f} times the median's own time in steps")
        self._tell(
            step, "data", by_data.rank, f"waits for data, by {by_data.excess:.0%} of a step more than the median"
        )
        return {
            "slowest_rank": by_own.rank,
            "slowest_over_median": round(1 + by_own.excess, 4),
            "slowest_data_rank": by_data.rank,
        }

    def _tell(self, step: int, what: str, rank: int | None, how: str) -> None:
        if rank is not None and (what, rank) not in self._said:
            self._said.add((what, rank))
            self.say(f"WARNING: step {step}: {named(rank, self._seat(rank))} {how}; all others wait for it")

    def _seat(self, rank: int) -> Seat:
        return self.seats[rank] if rank < len(self.seats) else Seat(0, "")


def named(rank: int, seat: Seat) -> str:
    """A rank as a reader is told of it."""
    return f"rank {rank} (node {seat.node}, {seat.host})" if seat.host else f"rank {rank} (node {seat.node})"
