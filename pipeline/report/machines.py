"""Which rank held a run up, as a strip of ranks and steps, and what its nodes did over time (system/node-<n>.csv).

Legend: T samples of a node, or looks at ranks; R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.callbacks.machine import OF_A_GPU
from pipeline.callbacks.samples import DIRECTORY, whole_lines
from pipeline.report.chart import Chart, Figure, Line, Strip, compact, percent, time_unit
from pipeline.report.ranks import Ranks
from pipeline.report.record import Run, Values

COLOURS = 8  # of the palette
_ROWS, _CELLS = 32, 64  # of a strip: more ranks share a row, more looks a cell
_FULL, _SEEN = 0.3, 0.05  # where a cell is darkest; below which nobody need look at waits for data
# Charts by key: title, how a value is written, the columns that are added up.
_OF_NODES: dict[str, tuple[str, Callable[[float], str], tuple[str, ...]]] = {
    "cpu": ("Processors in use", percent, ("cpu",)),
    "gpu": ("GPUs in use, mean of a node", percent, ("gpu_use",)),
    "gpu-memory": ("GPU memory in use, all of a node, GB", compact, ("gpu_memory_used_gb",)),
    "gpu-celsius": ("Hottest GPU, °C", compact, ("gpu_celsius",)),
    "gpu-watts": ("Power of all GPUs of a node, W", compact, ("gpu_watts",)),
    "memory": ("Memory in use, GB", compact, ("memory_used_gb",)),
    "network": ("Network in and out, MB a second", compact, ("network_in_mb", "network_out_mb")),
    "disk": ("Disks read and written, MB a second", compact, ("disk_read_mb", "disk_write_mb")),
    "disk-free": ("Free for the run's directory, GB", compact, ("disk_free_gb",)),
}
_OVER_GPUS: dict[str, Callable[..., Values]] = {
    "use": np.nanmean,
    "memory_used_gb": np.nansum,
    "celsius": np.nanmax,
    "watts": np.nansum,
}
KEYS = ("ranks-own", "ranks-data", *_OF_NODES)


@dataclass(frozen=True, slots=True)
class Node:
    """at: seconds since 1970 of its samples (T). values: columns by name, NaN where one is not known."""

    number: int
    at: Values
    values: dict[str, Values]


def machines(runs: Sequence[Run]) -> list[Figure]:
    """Strips of a single run, since several would not stand side by side, and what nodes did."""
    return [*(_strips(runs[0].ranks) if len(runs) == 1 else []), *_nodes(runs)]


def _strips(ranks: Ranks) -> list[Figure]:
    if not ranks.count:
        return []
    note = f"Orange: above the median of the other ranks, blue: below; darkest at {_FULL:.0%}"
    strips: list[Figure] = []
    for key, title, of in (
        ("own", "Own time in steps, rank by rank", "of it"),
        ("data", "Waiting for data, rank by rank", "of a step"),
    ):
        names, cells = _cells(ranks, key)
        if key == "own" or any(abs(value) >= _SEEN for row in cells for *_, value in row):
            strips.append(Strip(f"ranks-{key}", title, "optimizer steps", names, cells, _FULL, f"{note} {of}."))
    return strips


def _cells(ranks: Ranks, key: str) -> tuple[list[str], list[list[tuple[float, float, float]]]]:
    """Rows by name, and their cells: of ranks that share a row the one that is furthest above, of looks the middle."""
    share = math.ceil(ranks.count / _ROWS)
    firsts = range(0, ranks.count, share)
    names = [f"rank {i}" if share == 1 else f"{i} to {min(i + share, ranks.count) - 1}" for i in firsts]
    looks = sum(len(each.steps) for each in ranks.stretches)
    cells: list[list[tuple[float, float, float]]] = [[] for _ in firsts]
    before = 0.0
    for stretch in ranks.stretches:
        values_TR = stretch.excess.own if key == "own" else stretch.excess.data
        parts = np.array_split(np.arange(len(stretch.steps)), max(round(_CELLS * len(stretch.steps) / looks), 1))
        for part in (each for each in parts if len(each)):
            until = float(stretch.steps[part[-1]])
            middle_R = np.median(values_TR[part], axis=0)
            for row, first in enumerate(firsts):
                if first < len(middle_R):
                    cells[row].append((before, until, float(middle_R[first : first + share].max())))
            before = until
    return names, cells


def read_nodes(run: Path) -> list[Node]:
    """All nodes that have left samples, by number."""
    found = []
    for path in (run / DIRECTORY).glob("node-*.csv"):
        number = path.stem.partition("-")[2]
        lines = whole_lines(path)
        if number.isdigit() and lines:
            names = [name for name in lines[0] if name not in ("at", "host")]
            values = {name: np.array([_number(line[name]) for line in lines]) for name in names}
            found.append(Node(int(number), np.array([_number(line["at"]) for line in lines]), _with_gpus(values)))
    return sorted(found, key=lambda node: node.number)


def _with_gpus(values: dict[str, Values]) -> dict[str, Values]:
    """And gpu_<figure>, of all GPUs of the node together."""
    together = {}
    for name in OF_A_GPU:
        table = np.array([column for key, column in values.items() if key.startswith("gpu") and _of_gpu(key) == name])
        if table.size:
            known_T = np.isfinite(table).any(axis=0)
            column = np.full(table.shape[1], np.nan)
            column[known_T] = _OVER_GPUS[name](table[:, known_T], axis=0)
            together[f"gpu_{name}"] = column
    return values | together


def _of_gpu(column: str) -> str:
    """gpu12_use is of use."""
    return column.partition("_")[2]


def _nodes(runs: Sequence[Run]) -> list[Figure]:
    """A line for each node of a single run; the middle node's and the range of all, of several runs or many nodes."""
    found = [read_nodes(run.directory) for run in runs]
    began = [run.starts[0].at if run.starts else min((float(node.at[0]) for node in nodes), default=0.0)
             for run, nodes in zip(runs, found, strict=True)]  # fmt: skip
    longest = max((float(node.at[-1]) - at for nodes, at in zip(found, began, strict=True) for node in nodes),
                  default=0.0)  # fmt: skip
    unit, divisor = time_unit(longest)
    charts: list[Figure] = []
    for key, (title, number, names) in _OF_NODES.items():
        lines = []
        for place, (run, nodes, at) in enumerate(zip(runs, found, began, strict=True)):
            known = [(node, y) for node in nodes if np.isfinite(y := _sum(node, names)).any()]
            if len(runs) == 1 and len(known) <= COLOURS:
                lines += [Line(f"node {node.number}", (node.at - at) / divisor, y, node.number % COLOURS)
                          for node, y in known]  # fmt: skip
            elif known:
                lines.append(_range(run.name, [((node.at - at) / divisor, y) for node, y in known], place % COLOURS))
        if lines:
            most = max(float(np.nanmax(line.y if line.high is None else line.high)) for line in lines)
            charts.append(
                Chart(key, title, f"{unit} since the first start", lines, number, low=0.0,
                      high=1.0 if number is percent or most < 1 else None,
                      note="" if lines[0].high is None else "The middle node, and the range of all.",
                      legend=len(runs) == 1 and len(lines) > 1)
            )  # fmt: skip
    return charts


def _sum(node: Node, names: Sequence[str]) -> Values:
    """Of columns; NaN where one of them is not known."""
    none = np.full(len(node.at), np.nan)
    total: Values = np.sum([node.values.get(name, none) for name in names], axis=0)
    return total


def _range(name: str, nodes: Sequence[tuple[Values, Values]], colour: int) -> Line:
    """The middle node, and the range of all, at each of the times of the one with most samples."""
    x = max((x for x, _ in nodes), key=len)
    table = np.array([np.interp(x, at[known], y[known]) for at, y in nodes if (known := np.isfinite(y)).any()])
    return Line(name, x, np.median(table, axis=0), colour, table.min(axis=0), table.max(axis=0))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
