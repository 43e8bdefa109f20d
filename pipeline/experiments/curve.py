"""Validation accuracy of one training over its steps.

Legend: V validations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.experiments.experiment import Measured
from pipeline.experiments.interval import band, interval
from pipeline.report.chart import Line
from pipeline.report.record import Values


@dataclass(frozen=True, slots=True)
class Curve:
    """step_V, top1_V: optimizer steps and fractions. diverged: its loss, or its weights, were no numbers any more."""

    step_V: Values
    top1_V: Values
    diverged: bool = False

    @property
    def best(self) -> float:
        """The most that was reached; 0 for a training that never got to a validation."""
        return float(self.top1_V.max(initial=0.0))

    @property
    def last(self) -> float:
        """At the end; 0 for a training that diverged before it."""
        return 0.0 if self.diverged or not len(self.top1_V) else float(self.top1_V[-1])

    def first_at(self, top1: float) -> float:
        """Steps until a validation reaches top1; infinite for never."""
        reached = np.flatnonzero(self.top1_V >= top1)
        return float(self.step_V[reached[0]]) if len(reached) else math.inf

    def measured(self) -> Measured:
        return {"step": self.step_V.tolist(), "top1": self.top1_V.tolist(), "diverged": self.diverged}


def curve(measured: Measured) -> Curve:
    """What Curve.measured gave."""
    return Curve(np.array(measured["step"], dtype=float), np.array(measured["top1"], dtype=float),
                 measured["diverged"])  # fmt: skip


def mean_line(name: str, curves: Sequence[Curve], colour: int) -> Line:
    """The mean over seeds with its 95 % interval, as far as every one of them came."""
    count = min(len(each.top1_V) for each in curves)
    step_V = max((each.step_V for each in curves), key=len)[:count]
    at = [interval([float(each.top1_V[place]) for each in curves]) for place in range(count)]
    return band(name, step_V, at, colour, bounds=(0.0, 1.0))
