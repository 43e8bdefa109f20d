"""ranks.csv as tables, one for each stretch of a run in which the same ranks sat in the same seats; and who was named.

Legend: T looks, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.callbacks.stragglers import COLUMNS, WINDOW, Excess, Seat, excess, named

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stretch:
    """steps: of its looks (T)."""

    steps: Values
    seats: list[Seat]
    excess: Excess


@dataclass(frozen=True, slots=True)
class Ranks:
    """In the order of steps."""

    stretches: list[Stretch] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The most that there were."""
        return max((len(each.seats) for each in self.stretches), default=0)

    def sentences(self, train: dict[str, Values]) -> list[str]:
        """Who was named, where, when and by how much, as a reader is told. train: columns of metrics.csv."""
        said = []
        for each in self.stretches:
            for rank, first, last in _named(each, train, "slowest_rank"):
                ratio = 1 + float(np.median(each.excess.own[first : last + 1, rank]))
                said.append(f"{named(rank, each.seats[rank])} took {ratio:.2f} times the median's own time in steps, "
                            f"{_when(each, first, last)}; all others waited for it.")  # fmt: skip
            for rank, first, last in _named(each, train, "slowest_data_rank"):
                share = float(np.median(each.excess.data[first : last + 1, rank]))
                said.append(f"{named(rank, each.seats[rank])} waited for data, by {share:.0%} of a step more than the "
                            f"median, {_when(each, first, last)}; all others waited for it.")  # fmt: skip
        return said


def _named(stretch: Stretch, train: dict[str, Values], column: str) -> list[tuple[int, int, int]]:
    """Each rank that rows of the stretch name, and its first and last look: a row judges the looks before it."""
    at = np.searchsorted(train["step"], stretch.steps)
    rows_T = np.append(train[column], np.nan)[np.minimum(at, len(train["step"]))]
    same_T = np.append(train["step"], np.nan)[np.minimum(at, len(train["step"]))] == stretch.steps
    found = []
    for rank in range(len(stretch.seats)):
        looks = np.flatnonzero(same_T & (rows_T == rank))
        for part in np.split(looks, np.flatnonzero(np.diff(looks) > WINDOW) + 1):  # each time that it was slow
            if len(part):
                found.append((rank, max(int(part[0]) + 1 - WINDOW, 0), int(part[-1])))
    return found


def _when(stretch: Stretch, first: int, last: int) -> str:
    return f"from step {stretch.steps[first]:,.0f} to {stretch.steps[last]:,.0f}"


def read_ranks(path: Path) -> Ranks:
    """Whole looks alone, of two ranks or more; nothing where there are none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return Ranks()
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    if header != ",".join(COLUMNS):
        return Ranks()
    looks: dict[int, list[tuple[Seat, float, float]]] = {}
    for line in lines:
        words = line.split(",")
        try:
            step, rank, node = (int(word) for word in words[:3])
            own, data = (float(word) for word in words[4:])
        except ValueError:
            continue
        listed = looks.setdefault(step, [])
        if rank == len(listed) and np.isfinite([own, data]).all():
            listed.append((Seat(node, words[3]), own, data))
    return Ranks([_stretch(steps, looks) for steps in _alike(looks)])


def _alike(looks: dict[int, list[tuple[Seat, float, float]]]) -> list[list[int]]:
    """Steps of looks that follow one another with the same ranks in the same seats. A look that breaks off is none."""
    found: list[list[int]] = []
    before: list[Seat] = []
    newest = max(looks, default=0)
    for step in sorted(looks):
        seats = [seat for seat, *_ in looks[step]]
        if len(seats) < 2 or (step == newest and before and seats == before[: len(seats)] != before):
            continue
        if seats != before:
            found.append([])
            before = seats
        found[-1].append(step)
    return found


def _stretch(steps: list[int], looks: dict[int, list[tuple[Seat, float, float]]]) -> Stretch:
    own_TR, data_TR = (np.array([[rank[i] for rank in looks[step]] for step in steps]) for i in (1, 2))
    return Stretch(np.array(steps, dtype=np.float64), [seat for seat, *_ in looks[steps[0]]], excess(own_TR, data_TR))
