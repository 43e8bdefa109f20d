"""The charts of a report: what each shows of one run or of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.report.accounting import Account, account, ends, running_hours
from pipeline.report.chart import Bar, Chart, Figure, Lanes, Line, compact, percent, time_unit
from pipeline.report.looks import KEYS as LOOKS
from pipeline.report.looks import looks
from pipeline.report.machines import KEYS as MACHINES
from pipeline.report.machines import machines
from pipeline.report.record import DONE, FAILED, INTERRUPTED, KILLED, RUNNING, Run, Values

COLOURS = 8  # of the palette
KEYS = (  # of every chart that there may be: a picture's name
    "accuracy-steps", "accuracy-time", "loss-steps", "loss-time", "loss-validation", "rate", "images", "data-wait",
    "statistics-wait", "gradient-wait", "checkpoint-wait", "mfu", "memory-gb", "time", "starts", "goodput", *MACHINES,
    "norm-spread", "norm-dead", "norm-mean-drift", "norm-variance-drift", *LOOKS,
)  # fmt: skip
# Where time goes: name, colour, hollow. Hollow is what is nobody's work.
WORK = (
    ("steps", 0, False), ("statistics", 5, False), ("gradients", 2, False), ("data", 1, False),
    ("checkpoints", 3, False), ("validation", 4, False), ("starting", 7, False), ("done again, rest", 6, False),
    ("between starts", 7, True),
)  # fmt: skip
ENDINGS = {DONE: 2, RUNNING: 5, INTERRUPTED: 4, KILLED: 1, FAILED: 3}


def figures(runs: Sequence[Run], target: float) -> list[tuple[str, Sequence[Figure]]]:
    """Sections by title, each with its charts. target: top-1 that a rule marks; NaN for none."""
    return [
        ("Accuracy and loss", _scores(runs, target)),
        ("Speed", _speed(runs)),
        ("Time", _time(runs)),
        ("Ranks and nodes", machines(runs)),
        ("Batch normalization", _norms(runs)),
        *looks(runs),
    ]


def _scores(runs: Sequence[Run], target: float) -> list[Figure]:
    rules = [] if math.isnan(target) else [(target, f"target {percent(round(target, 4))}")]
    best = [run.val["top1"] for run in runs]
    longest = max((float(hours[-1]) for run in runs for table in (run.train, run.val)
                   if len(hours := running_hours(run, table))), default=0.0)  # fmt: skip
    unit, seconds = time_unit(longest * 3600)
    times = f"{unit} of running"

    def over_time(lines: Sequence[Line]) -> list[Line]:
        return [replace(line, x=line.x * 3600 / seconds) for line in lines]

    low = min((float(values.min()) for values in best if len(values)), default=0.0)
    floor = 0.0 if low < 0.5 else None
    steps = "optimizer steps"
    return [
        Chart("accuracy-steps", "Validation top-1 over steps", steps, _validations(runs, "step", "top1"), percent,
              low=floor, rules=rules),
        Chart("accuracy-time", "Validation top-1 over time", times, over_time(_validations(runs, "hours", "top1")),
              percent, low=floor, rules=rules, note="Without the time between starts."),
        Chart("loss-steps", "Training loss over steps", steps, _trainings(runs, "step", "loss"), compact, low=0.0,
              robust=True),
        Chart("loss-time", "Training loss over time", times, over_time(_trainings(runs, "hours", "loss")), compact,
              low=0.0, robust=True),
        Chart("loss-validation", "Validation loss over steps", steps, _validations(runs, "step", "loss"), compact,
              low=0.0, robust=True),
        Chart("rate", "Learning rate", steps, _trainings(runs, "step", "rate"), compact, low=0.0),
    ]  # fmt: skip


def _speed(runs: Sequence[Run]) -> list[Figure]:
    charts: list[Figure] = [
        Chart("images", "Images a second, all ranks", "optimizer steps", _trainings(runs, "step", "images_per_s"),
              compact, low=0.0),
    ]  # fmt: skip
    for name, title in (
        ("data_wait", "waiting for data"), ("statistics_wait", "in statistics collectives"),
        ("gradient_wait", "in gradient collectives"), ("checkpoint_wait", "in checkpoints"),
    ):  # fmt: skip
        lines = _trainings(runs, "step", name)
        charts.append(Chart(name.replace("_", "-"), f"Share of time {title}", "optimizer steps", lines, percent,
                            low=0.0))  # fmt: skip
    for name, title, number in (
        ("mfu", "Model FLOP utilization", percent),
        ("memory_gb", "Memory of rank 0, GB", compact),
    ):
        lines = _trainings(runs, "step", name)
        if any(np.isfinite(line.y).any() for line in lines):
            charts.append(Chart(name.replace("_", "-"), title, "optimizer steps", lines, number, low=0.0))
    return charts


def _time(runs: Sequence[Run]) -> list[Figure]:
    charts: list[Figure] = []
    known = [(run, found) for run in runs if (found := account(run)) is not None]
    if known:
        unit, divisor = time_unit(max(found.wall for _, found in known))
        charts.append(
            Lanes("time", "Where the time went", unit, [_worth(run, found) for run, found in known],
                  [_work(found, divisor, unit) for _, found in known], compact, WORK,
                  note="Steps hold waiting for others in statistics and gradients, drawn beside them.")
        )  # fmt: skip
    started = [run for run in runs if run.starts]
    if started:
        unit, divisor = time_unit(max(ends(run)[-1] - run.starts[0].at for run in started))
        shown = {start.ended for run in started for start in run.starts}
        charts.append(
            Lanes("starts", "Starts of each run", f"{unit} since its first start", [_named(run) for run in started],
                  [_starts(run, divisor, unit) for run in started], compact,
                  [(name, colour, False) for name, colour in ENDINGS.items() if name in shown],
                  marks=[[(start.at - run.starts[0].at) / divisor for start in run.starts[1:]] for run in started],
                  note="By how each ended; a bar across the lane is a restart.")
        )  # fmt: skip
    goodput = _trainings(runs, "step", "goodput")
    if any(np.isfinite(line.y).any() for line in goodput):
        charts.append(Chart("goodput", "Goodput so far", "optimizer steps", goodput, percent, low=0.0))
    return charts


def _norms(runs: Sequence[Run]) -> list[Figure]:
    """Of each figure the middle layer's line, and the range in which most layers are."""
    watched = [(number, run) for number, run in enumerate(runs) if run.norms is not None]
    charts: list[Figure] = []
    for name, title, number in (
        ("spread", "Spread of the ranks' means", compact), ("dead", "Dead channels", percent),
        ("mean_drift", "Drift of running means", compact), ("variance_drift", "Drift of running variances", compact),
    ):  # fmt: skip
        lines = []
        for place, run in watched:
            assert run.norms is not None
            values = run.norms.values[name]
            if np.isfinite(values).any():
                low, middle, high = (_quantile(values, q) for q in (0.15, 0.5, 0.85))
                lines.append(Line(run.name, run.norms.steps, middle, place % COLOURS, low, high))
        if lines:
            charts.append(Chart(f"norm-{name.replace('_', '-')}", title, "optimizer steps", lines, number, low=0.0,
                                note=_NORM_NOTES[name]))  # fmt: skip
    return charts


_NORM_NOTES = {
    "spread": "In standard deviations of a channel: 0 where ranks see alike data, about 1 where they see different.",
    "dead": "Channels without variance or gain, or so far below zero that ReLU is always 0.",
    "mean_drift": "How far the running mean is from the batch's, in standard deviations.",
    "variance_drift": "|log(running variance / the batch's)|.",
}


def _trainings(runs: Sequence[Run], x: str, y: str) -> list[Line]:
    return [Line(run.name, _x(run, run.train, x), run.train[y], number % COLOURS) for number, run in enumerate(runs)]


def _validations(runs: Sequence[Run], x: str, y: str) -> list[Line]:
    return [
        Line(run.name, _x(run, run.val, x), run.val[y], number % COLOURS, dots=len(run.val[y]) <= 40)
        for number, run in enumerate(runs)
    ]


def _x(run: Run, table: dict[str, Values], name: str) -> Values:
    return running_hours(run, table) if name == "hours" else table[name]


def _quantile(values: Values, q: float) -> Values:
    """Over layers, of those that have a value, the nearest one; NaN for a look without any."""
    ordered = np.sort(values, axis=1)  # NaN comes last. numpy's nanquantile takes 2 ms a look, this 3 us
    known_T = np.isfinite(values).sum(axis=1)
    place_T = np.rint(np.maximum(known_T - 1, 0) * q).astype(int)
    found: Values = np.take_along_axis(ordered, place_T[:, None], axis=1)[:, 0]
    return found


def _named(run: Run) -> str:
    again = len(run.starts) - 1
    return f"{_short(run.name)}: {again or 'no'} restart{'' if again == 1 else 's'}"


def _worth(run: Run, found: Account) -> str:
    return f"{_short(run.name)}: goodput {percent(round(found.goodput, 3))}"


def _short(name: str) -> str:
    return name if len(name) <= 36 else f"{name[:35]}…"


def _work(found: Account, divisor: float, unit: str) -> list[Bar]:
    computing = max(found.useful - found.statistics - found.gradients, 0.0)
    parts = (computing, found.statistics, found.gradients, found.data, found.checkpoints, found.validation,
             found.beginning, found.lost, found.between)  # fmt: skip
    bars, at = [], 0.0
    for (name, colour, hollow), seconds in zip(WORK, parts, strict=True):
        length = seconds / divisor
        if length > 0:
            bars.append(Bar(at, at + length, f"{name}: {length:.3g} {unit}", colour, hollow))
        at += length
    return bars


def _starts(run: Run, divisor: float, unit: str) -> list[Bar]:
    first = run.starts[0].at
    return [
        Bar((start.at - first) / divisor, (end - first) / divisor,
            f"start {number}: {start.ended}, {(end - start.at) / divisor:.3g} {unit}", ENDINGS.get(start.ended, 7))
        for number, (start, end) in enumerate(zip(run.starts, ends(run), strict=True), 1)
    ]  # fmt: skip
