"""A report, from directories of runs to a page and its pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.report import looks, png
from pipeline.report.accounting import best_top1
from pipeline.report.chart import Chart, Figure, drawn
from pipeline.report.figures import COLOURS, KEYS, figures
from pipeline.report.ledger import read_ledger
from pipeline.report.page import page
from pipeline.report.record import NotARunError, Run, read_run

PAGE, SHEET, LOOKS_SHEET = "index.html", "report.png", "looks.png"
# What the one picture of a report shows, in its order.
_ON_SHEET = ("accuracy-steps", "accuracy-time", "loss-steps", "images", "norm-mean-drift", "starts")
_LEVELS = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


def make_report(
    paths: Sequence[Path],
    output: Path | None = None,
    *,
    targets: Sequence[float] = (),
    with_ledger: bool = True,
    command: str = "pipeline report",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the page and the pictures of runs; returns the page. output: where to, else report/ of the first run.

    targets: top-1 to be reached, as fractions; none = the best of the first run, or levels below that of a single one.
    Raises NotARunError.
    """
    if len(paths) > COLOURS:
        raise NotARunError(f"{len(paths)} runs are too many to be told apart; give {COLOURS} at most")
    runs = read_runs(paths)
    chosen = list(targets) or default_targets(runs)
    sections = figures(runs, chosen[0] if len(runs) > 1 and chosen else math.nan)
    ledgers = {
        run.name: found
        for run in runs
        if with_ledger and (run.directory / "ledger").is_dir()
        if (found := read_ledger(run.directory / "ledger", progress))
    }
    output = output or runs[0].directory / "report"
    output.mkdir(parents=True, exist_ok=True)
    text = page(runs, sections, chosen, ledgers, command=command, now=datetime.now(tz=UTC))
    _write(output / PAGE, text)
    _pictures(runs, [chart for _, charts in sections for chart in charts], output)
    return output / PAGE


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs that can be told apart: those of one name get their directory in front. Raises NotARunError."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.directory)
    if len({run.directory.resolve() for run in runs}) < len(runs):
        raise NotARunError("a run is given twice; give each once")
    return runs


def default_targets(runs: Sequence[Run]) -> list[float]:
    """Top-1 to be reached where none is asked for: the best of the first run, or levels below that of a single one."""
    best = best_top1(runs[0])
    if not math.isfinite(best):
        return [math.nan]
    if len(runs) > 1:
        return [best]
    below = [level for level in _LEVELS if level <= best]
    return below[-4:] or [best]


def _pictures(runs: Sequence[Run], charts: Sequence[Figure], output: Path) -> None:
    legend = [(run.name, number % COLOURS) for number, run in enumerate(runs)] if len(runs) > 1 else []
    painted = {chart.key: png.paint(drawn(chart), chart.title, _told_apart(chart, legend)) for chart in charts}
    for key in KEYS:  # of an earlier report, which may have had more
        (output / f"{key}.png").unlink(missing_ok=True)
    for name, image in painted.items():
        png.save(image, output / f"{name}.png")
    png.save(png.together([painted[name] for name in _ON_SHEET if name in painted], 3), output / SHEET)
    (output / LOOKS_SHEET).unlink(missing_ok=True)
    if seen := [painted[name] for name in looks.KEYS if name in painted]:
        png.save(png.together(seen, 3), output / LOOKS_SHEET)


def _told_apart(chart: Figure, runs: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    """Names and colours of its lines, where there are several kinds."""
    if not isinstance(chart, Chart):
        return ()
    return [(line.name, line.colour) for line in chart.lines] if chart.legend else runs


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
