"""A page of experiments: every claim with its picture at a glance, then each with what was measured, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.data.shards import write_atomically
from pipeline.experiments.experiment import Table
from pipeline.experiments.result import Result
from pipeline.report import png
from pipeline.report.chart import Chart, Figure, drawn
from pipeline.report.document import charts, document
from pipeline.report.markup import Html, tag, text
from pipeline.report.markup import table as html_table
from pipeline.report.words import duration

PAGE = "index.html"
TITLE = "The science of batch normalization, reproduced"
VERDICTS = {True: "holds here", False: "does not hold here", None: "open"}
_KINDS = {True: "holds", False: "fails", None: "open"}


def write_page(results: Sequence[Result], path: Path, command: str) -> None:
    write_atomically(path, page(results, command).encode())


def write_pictures(result: Result, directory: Path) -> list[Path]:
    """Every figure as a PNG; those of an earlier result go."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(f"{result.experiment.name}-*.png"):
        old.unlink()
    return [save_picture(figure, directory / f"{figure.key}.png") for figure in result.finding.figures]


def save_picture(figure: Figure, path: Path) -> Path:
    legend = [(line.name, line.colour) for line in figure.lines] if isinstance(figure, Chart) and figure.legend else []
    png.save(png.paint(drawn(figure), figure.title, legend), path)
    return path


def page(results: Sequence[Result], command: str) -> str:
    """Of one experiment, or of several with an overview before them."""
    if len(results) == 1:
        return document(results[0].experiment.title, [tag("h1", results[0].experiment.title), *_section(results[0])],
                        command)  # fmt: skip
    body: list[Html] = [tag("h1", TITLE), tag("p", summary(results)), _overview(results)]
    for result in results:
        body.append(Html(f'<h2 id="{escape(result.experiment.name)}">{escape(result.experiment.title)}</h2>'))
        body += _section(result)
    return document(TITLE, body, command)


def summary(results: Sequence[Result]) -> str:
    """All of it in two sentences."""
    held = sum(result.finding.holds is True for result in results)
    failed = sum(result.finding.holds is False for result in results)
    open_ones = len(results) - held - failed
    parts = [f"{held} hold here"] if held else []
    parts += [f"{failed} do{'es' if failed == 1 else ''} not"] if failed else []
    parts += [f"{open_ones} {'is' if open_ones == 1 else 'are'} open"] if open_ones else []
    took = duration(math.fsum(result.seconds for result in results) / 3600)
    claims = f"{len(results)} claims" if len(results) > 1 else "One claim"
    return (
        f"{claims} about batch normalization, measured anew with the parts that train our networks: "
        f"{', '.join(parts)}. All of it took {took}; intervals are of 95 %, over seeds where nothing else is said."
    )


def _overview(results: Sequence[Result]) -> Html:
    tiles = []
    for result in results:
        figure = charts(result.finding.figures[:1]).text if result.finding.figures else ""
        tiles.append(
            f'<a class="claim" href="#{escape(result.experiment.name)}">{_verdict(result).text}'
            f"<b>{escape(result.experiment.title)}</b>{figure}<span>{escape(result.finding.said)}</span></a>"
        )
    return Html(f'<div class="claims">{"".join(tiles)}</div>')


def _section(result: Result) -> list[Html]:
    experiment, finding = result.experiment, result.finding
    return [
        Html(f"<blockquote>{escape(experiment.claim)}<cite>{escape(experiment.source)}</cite></blockquote>"),
        tag("p", _verdict(result), " ", finding.said, kind="said"),
        *([charts(finding.figures)] if finding.figures else []),
        *(part for table in finding.tables for part in _table(table)),
        *(tag("p", remark, kind="warn") for remark in finding.remarks),
        tag("p", Html(f"<code>{escape(result.command)}</code>"), f" · {how(result)}", kind="soft"),
    ]


def how(result: Result) -> str:
    """When, where and with what it was measured."""
    asked = result.asked
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    size = "at full size, " if asked["full"] else ""
    seeds = f"{asked['seeds']} seed{'s' if asked['seeds'] > 1 else ''}"
    return f"{result.date}, {size}{seeds}, {duration(result.seconds / 3600)} on {result.machine}; {versions}"


def _verdict(result: Result) -> Html:
    return tag("span", VERDICTS[result.finding.holds], kind=f"verdict {_KINDS[result.finding.holds]}")


def _table(table: Table) -> list[Html]:
    note = [tag("p", table.note, kind="soft")] if table.note else []
    head, rows = list(table.head), [list(row) for row in table.rows]
    return [Html(f"<h3>{text(table.title)}</h3>"), html_table(head, rows, range(1, len(head))), *note]
