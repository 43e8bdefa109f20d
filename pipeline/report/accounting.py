"""Where the time of a run went, over all its starts, and when it reached what.

Wall time = steps that count + waiting for data + checkpoints + validations + beginnings + between starts + the rest,
which is steps that a restart undid and what no row tells of. Goodput = steps that count / wall time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.record import Run, Values


@dataclass(frozen=True, slots=True)
class Account:
    """Seconds. statistics and gradients are parts of useful; everything else adds up to wall."""

    wall: float
    useful: float
    statistics: float
    gradients: float
    data: float
    checkpoints: float
    validation: float
    beginning: float
    between: float

    @property
    def lost(self) -> float:
        """The rest: steps that were done again, ends of starts, what no row tells of."""
        known = (self.useful, self.data, self.checkpoints, self.validation, self.beginning, self.between)
        return max(self.wall - sum(known), 0.0)

    @property
    def goodput(self) -> float:
        return self.useful / self.wall if self.wall > 0 else math.nan


def ends(run: Run) -> list[float]:
    """When each start ended, seconds since 1970: as noted, else the last that is known of it."""
    found = []
    for number, start in enumerate(run.starts):
        if start.ended_at is not None:
            found.append(start.ended_at)
            continue
        follower = run.starts[number + 1] if number + 1 < len(run.starts) else None
        until = follower.at if follower else math.inf
        signs = [at for table in (run.train, run.val) for at in table["at"] if start.at <= at <= until]
        if follower is not None and follower.undone_at is not None:
            signs.append(follower.undone_at)
        found.append(min(max([start.at, *signs]), until))
    return found


def account(run: Run) -> Account | None:
    """None for a run whose rows tell no times, as those of older versions."""
    train, val = run.train, run.val
    if not run.starts or not len(train["at"]) or np.isnan(train["at"]).all():
        return None
    ended = ends(run)
    span = np.nan_to_num(train["span"])
    data, checkpoints = (float(span @ np.nan_to_num(train[name])) for name in ("data_wait", "checkpoint_wait"))
    return Account(
        wall=max(ended[-1] - run.starts[0].at, 0.0),
        useful=float(span.sum()) - data - checkpoints,
        statistics=float(span @ np.nan_to_num(train["statistics_wait"])),
        gradients=float(span @ np.nan_to_num(train["gradient_wait"])),
        data=data,
        checkpoints=checkpoints,
        validation=float(np.nansum(val["span"])),
        beginning=_beginning(run, ended),
        between=sum(max(after.at - end, 0.0) for end, after in zip(ended, run.starts[1:], strict=False)),
    )


def _beginning(run: Run, ended: Sequence[float]) -> float:
    """Seconds from each start to its first step, where a row of it tells when that was."""
    total = 0.0
    for start, end in zip(run.starts, ended, strict=True):
        for table in (run.train, run.val):
            inside = np.flatnonzero((table["at"] >= start.at) & (table["at"] <= end))
            if len(inside):
                total += max(float(table["at"][inside[0]] - table["seconds"][inside[0]]) - start.at, 0.0)
                break
    return total


def running_hours(run: Run, table: dict[str, Values]) -> Values:
    """When each row was written, in hours since the run began, without what lay between its starts."""
    at_T = table["at"]
    if not run.starts or np.isnan(at_T).all():
        return _hours_of_starts(table["seconds"])
    begins, ended = np.array([start.at for start in run.starts]), np.array(ends(run))
    before = np.concatenate([[0.0], np.cumsum(np.maximum(ended - begins, 0.0))])
    number_T = np.clip(np.searchsorted(begins, at_T, side="right") - 1, 0, None)
    hours: Values = (before[number_T] + np.clip(at_T - begins[number_T], 0.0, None)) / 3600
    return np.maximum.accumulate(np.nan_to_num(hours))


def _hours_of_starts(seconds_T: Values) -> Values:
    """The same of rows that know only how long their own start had trained: where that falls, another one began."""
    begins = np.flatnonzero(np.diff(seconds_T, prepend=0.0) < 0)
    offset_T = np.zeros_like(seconds_T)
    for i in begins:
        offset_T[i:] += seconds_T[i - 1]
    hours: Values = (seconds_T + offset_T) / 3600
    return hours


@dataclass(frozen=True, slots=True)
class Reached:
    """The first validation at or above a target."""

    step: int
    epoch: float
    hours: float


def first_at(run: Run, target: float) -> Reached | None:
    """When a validation first had a top-1 of target or more; None if never."""
    at = np.flatnonzero(run.val["top1"] >= target)
    if not len(at):
        return None
    first = at[0]
    hours = running_hours(run, run.val)
    return Reached(int(run.val["step"][first]), float(run.val["epoch"][first]), float(hours[first]))


def best_top1(run: Run) -> float:
    """The highest validation top-1; NaN before the first validation."""
    return float(np.max(run.val["top1"])) if len(run.val["top1"]) else math.nan


def lost_steps(run: Run) -> list[int]:
    """Of each start, how many steps of the one before it trains again."""
    return [max(start.undone_step - start.step, 0) if start.undone_step else 0 for start in run.starts]
