"""How a report says what it knows of runs: fractions, durations, values, and the keys in which configs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.report.record import Run

APART = ("run.id", "run.dir")  # differ between any two runs
ABSENT, NEVER, UNKNOWN = "(absent)", "never", "–"


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys that have not the same value in every run, in the order in which they stand there."""
    keys = dict.fromkeys(name for run in runs for name in run.config)
    return [name for name in keys if name not in APART and len({value_of(run, name) for run in runs}) > 1]


def value_of(run: Run, key: str) -> str:
    """A key of a run's config as it is written there, or that it is not."""
    return written(run.config.get(key, ABSENT))


def written(value: object) -> str:
    """A value as a config writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value) if value != "" else '""'


def fraction(value: float) -> str:
    """Of 1, in per cent; a dash for NaN."""
    return f"{value * 100:.4g} %" if math.isfinite(value) else UNKNOWN


def duration(hours: float) -> str:
    """Hours as a reader says them: 3.2 h, 41 min, 12 s; a dash for NaN."""
    if not math.isfinite(hours):
        return UNKNOWN
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 2 else f"{hours * 3600:.0f} s"
