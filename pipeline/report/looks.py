"""What was seen inside the networks of runs: percentiles.csv and gradients.csv, and the charts of both.

Runs stand side by side where their layers have the same name.   Legend: T looks, L layers, B bins, P percentiles.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.report.chart import Chart, Line, compact, percent
from pipeline.report.record import Run, Values

COLOURS = 8  # of the palette
PERCENTILES, GRADIENTS = 6, 12  # charts of each at most
KEYS = (*(f"percentiles-{n + 1}" for n in range(PERCENTILES)), *(f"gradients-{n + 1}" for n in range(GRADIENTS)))
UNITS = "all"  # in percentiles.csv, in place of a unit's number
LOW, A_DECADE, BINS = -10, 4, 97  # of callbacks/histogram.py: the least power of ten, bins between two powers, all


@dataclass(frozen=True, slots=True)
class Histogram:
    """Of the gradient of a layer at its newest look. share_B: of values by magnitude, both signs together."""

    step: int
    deviation: float
    kurtosis: float
    share_B: Values


def read_percentiles(directory: Path) -> dict[tuple[str, bool], tuple[str, Values]]:
    """(T, 1 + P) steps and percentiles, and the unit, by layer and whether they are of all its units."""
    found: dict[tuple[str, bool], tuple[str, list[list[float]]]] = {}
    for row in _rows(directory / "percentiles.csv", 6):
        step, layer, unit, *values = row
        try:
            numbers = [float(step), *map(float, values)]
        except ValueError:
            continue
        found.setdefault((layer, unit == UNITS), (unit, []))[1].append(numbers)
    return {key: (unit, np.array(rows)) for key, (unit, rows) in found.items()}


def read_gradients(directory: Path) -> dict[str, Histogram]:
    """The newest look at each layer."""
    found = {}
    for step, layer, _, deviation, kurtosis, _, counts in _rows(directory / "gradients.csv", 7):
        try:
            counts_B = np.array([float(count) for count in counts.split()])
            if len(counts_B) != BINS:  # a damaged line, or another version's
                continue
            found[layer] = Histogram(int(step), float(deviation), float(kurtosis), by_magnitude(counts_B))
        except ValueError:
            continue
    return found


def by_magnitude(counts_B: Values) -> Values:
    """Shares of all values, both signs together, of counts in BINS bins; those nearest to zero are left out."""
    middle = BINS // 2
    return np.asarray((counts_B[middle + 1 :] + counts_B[:middle][::-1]) / max(counts_B.sum(), 1.0), dtype=np.float64)


def looks(runs: Sequence[Run]) -> list[tuple[str, list[Chart]]]:
    """Sections by title; without charts where nobody has looked."""
    return [
        ("Inputs of nonlinearities", _percentiles([read_percentiles(run.directory) for run in runs], runs)),
        ("Gradients by layer", _gradients([read_gradients(run.directory) for run in runs], runs)),
    ]


def _percentiles(seen: Sequence[dict[tuple[str, bool], tuple[str, Values]]], runs: Sequence[Run]) -> list[Chart]:
    """Figure 1 b and c of Ioffe & Szegedy 2015: three lines for each run, and the band between the outer ones."""
    keys = list(dict.fromkeys(key for each in seen for key in each))[-PERCENTILES:]
    charts = []
    for number, key in enumerate(keys):
        layer, is_all = key
        unit = next(each[key][0] for each in seen if key in each)
        lines = []
        for place, (run, each) in enumerate(zip(runs, seen, strict=True)):
            if key in each:
                step_T, low_T, middle_T, high_T = each[key][1].T
                colour = place % COLOURS
                lines += [
                    Line(f"{run.name} 50 %", step_T, middle_T, colour, low_T, high_T),
                    Line(f"{run.name} 15 %", step_T, low_T, colour),
                    Line(f"{run.name} 85 %", step_T, high_T, colour),
                ]
        charts.append(
            Chart(f"percentiles-{number + 1}", f"{layer}, {'all units' if is_all else f'unit {unit}'}",
                  "optimizer steps", lines, compact,
                  note="15th, 50th and 85th percentile over a batch of what the nonlinearity gets.")
        )  # fmt: skip
    return charts


def _gradients(seen: Sequence[dict[str, Histogram]], runs: Sequence[Run]) -> list[Chart]:
    layers = _spread(list(dict.fromkeys(layer for each in seen for layer in each)), GRADIENTS)
    there = [each[layer].share_B for layer in layers for each in seen if layer in each]
    if not there:
        return []
    filled = np.flatnonzero(np.max(there, axis=0) > 0)
    first, last = (max(int(filled[0]) - 1, 0), int(filled[-1]) + 2) if len(filled) else (0, 1)
    most = max(float(share_B.max()) for share_B in there)
    charts = []
    for number, layer in enumerate(layers):
        lines, said = [], []
        for place, (run, each) in enumerate(zip(runs, seen, strict=True)):
            if layer in each:
                share_B = each[layer].share_B[first:last]
                power_B = LOW + (first + np.arange(len(share_B)) + 0.5) / A_DECADE
                zero_B = np.zeros(len(share_B))
                lines.append(Line(run.name, power_B, share_B, place % COLOURS, zero_B, share_B))
                which = (
                    f"{run.name} at step {each[layer].step:,}: " if len(runs) > 1 else f"Step {each[layer].step:,}: "
                )
                said.append(f"{which}deviation {each[layer].deviation:.2g}, kurtosis {_kurtosis(each[layer])}")
        charts.append(
            Chart(f"gradients-{number + 1}", layer, "log10 |gradient|", lines, percent, low=0.0, high=most,
                  note="; ".join(said) + ".")
        )  # fmt: skip
    return charts


def _kurtosis(seen: Histogram) -> str:
    return f"{seen.kurtosis:.3g}" if math.isfinite(seen.kurtosis) else "none"


def _spread(layers: Sequence[str], most: int) -> list[str]:
    """At most so many, from the first to the last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]


def _rows(path: Path, columns: int) -> list[list[str]]:
    """Whole lines of a csv that has so many columns, without the header; none where there is no such file."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    _, *lines = csv.reader(text[: text.rfind("\n") + 1].splitlines() or [""])
    return [line for line in lines if len(line) == columns and line[0].isdigit()]
