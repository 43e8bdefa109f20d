"""A mean with its 95 % interval, by Student's t: the spread over seeds that every table shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.chart import Line
from pipeline.report.record import Values


@dataclass(frozen=True, slots=True)
class Interval:
    """mean +- half, over n values; half is infinite for a single one."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def said(self, places: int = 3, scale: float = 1.0, unit: str = "") -> str:
        """As 1.467 ± 0.003; the mean alone where there is no spread to be known."""
        mean = f"{self.mean * scale:.{places}f}"
        return f"{mean}{unit}" if not math.isfinite(self.half) else f"{mean} ± {self.half * scale:.{places}f}{unit}"


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of the population that the values are drawn from. Raises ValueError for none."""
    from scipy.stats import t

    if not len(values):
        raise ValueError("an interval needs values, and there are none")
    known = np.asarray(values, dtype=np.float64)
    n = len(known)
    if n == 1:
        return Interval(float(known[0]), math.inf, 1)
    half = float(t.ppf(0.975, n - 1) * known.std(ddof=1) / math.sqrt(n))
    return Interval(float(known.mean()), half, n)


def verdict(differences: Sequence[Interval]) -> bool | None:
    """Of a claim that each is positive: False where one is below zero, None where one may be or there are none."""
    if any(each.high < 0 for each in differences):
        return False
    return True if differences and all(each.low > 0 for each in differences) else None


def band(
    name: str, x: Values, at: Sequence[Interval], colour: int, *,
    bounds: tuple[float, float] = (-math.inf, math.inf), dots: bool = False,
) -> Line:  # fmt: skip
    """A curve of means with their intervals around it, as far as the bounds; of single values the means alone."""
    mean = np.array([each.mean for each in at])
    if not at or at[0].n == 1:
        return Line(name, x, mean, colour, dots=dots)
    low, high = (np.clip(side, *bounds) for side in ([each.low for each in at], [each.high for each in at]))
    return Line(name, x, mean, colour, low, high, dots)
