"""An ensemble of evaluated runs: its table, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.data.shards import write_atomically
from pipeline.evaluation.ensemble import Comparison, Standing, compare
from pipeline.evaluation.intervals import DRAWS, Interval
from pipeline.evaluation.predictions import Predictions, PredictionsError
from pipeline.evaluation.results import PREDICTIONS, digest_of
from pipeline.evaluation.truth import Truth
from pipeline.run.evaluating import Question

ENSEMBLE = "ensemble.json"


def compare_members(
    questions: Sequence[Question],
    seen: Callable[[Predictions, Question], Predictions] = lambda predictions, question: predictions,
    truth_of: Callable[[Predictions], Truth] | None = None,
) -> Comparison:
    """Members that are all evaluated, and their mean. Raises PredictionsError.

    seen: what counts of a member's predictions. truth_of: see ensemble.compare.
    """
    members = []
    for question in questions:
        predictions = question.results().predictions
        if predictions is None:
            raise PredictionsError(f"{question.directory} holds no {PREDICTIONS}; evaluate {question.config.directory}")
        members.append(seen(predictions, question))
    return compare(members, truth_of)


def place_of(questions: Sequence[Question]) -> Path:
    """A directory beside the first run for these members, in whatever order they are given."""
    members = sorted(digest_of(question.settings) for question in questions)
    # Not ensemble-...: the members may be called so, and who gives them as runs/ensemble-* would give this one, too.
    return questions[0].config.directory.parent / f"mean-of-{len(members)}-{digest_of({'members': members})[:8]}"


def keep(comparison: Comparison, questions: Sequence[Question], directory: Path) -> dict[str, Any]:
    """Write ensemble.json and the ensemble's predictions; returns what the first says. Raises OSError."""
    best = questions[comparison.best].config.directory
    facts = {
        "members": [
            {**_of(question), **_errors(standing)}
            for question, standing in zip(questions, comparison.members, strict=True)
        ],
        "ensemble": _errors(comparison.ensemble),
        "difference": {"to": str(best), **_named("top1", comparison.top1), **_named("top5", comparison.top5)},
        "left_out": len(comparison.left_out),
        "said": _said(comparison, best),
    }
    directory.mkdir(parents=True, exist_ok=True)
    comparison.predictions.save(directory / PREDICTIONS)
    write_atomically(directory / ENSEMBLE, (json.dumps(facts, indent=2) + "\n").encode())
    return facts


def table_of(facts: dict[str, Any]) -> Table:
    table = Table(title=f"ensemble of {len(facts['members'])}: the mean of class probabilities", title_justify="left")
    head, (*members, ensemble) = rows_of(facts)
    for name in head:
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name), overflow="fold")
    for row in members:
        table.add_row(*row)
    table.add_section()
    table.add_row(*ensemble, style="bold")
    return table


def rows_of(facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table's head and rows, the ensemble's last."""
    ids = [Path(member["run"]).name for member in facts["members"]]
    rows = [
        [name if ids.count(name) == 1 else member["run"], f"{member['step']:,}", str(member["views"]), *_cells(member)]
        for member, name in zip(facts["members"], ids, strict=True)
    ]
    head = ["", "step", "views", "images", "top-1 error, %", "top-5 error, %"]
    return head, [*rows, ["ensemble", "", "", *_cells(facts["ensemble"])]]


def _of(question: Question) -> dict[str, Any]:
    return {
        "run": str(question.config.directory), "checkpoint": question.checkpoint.name, "step": question.step,
        "views": question.views, "statistics": question.settings["statistics"], "results": str(question.directory),
    }  # fmt: skip


def _errors(standing: Standing) -> dict[str, Any]:
    return {"images": standing.images, **_named("top1_error", standing.top1), **_named("top5_error", standing.top5)}


def _named(name: str, interval: Interval) -> dict[str, Any]:
    return {name: interval.value, f"{name}_interval": [interval.low, interval.high]}


def _cells(errors: dict[str, Any]) -> list[str]:
    cells = [f"{errors['images']:,}"]
    for name in ("top1_error", "top5_error"):
        low, high = errors[f"{name}_interval"]
        cells.append(f"{100 * errors[name]:.2f} ({100 * low:.2f}–{100 * high:.2f})")
    return cells


def _said(comparison: Comparison, best: Path) -> list[str]:
    """What stands below the table."""
    top1, top5 = (f"{100 * d.value:+.2f} ({100 * d.low:+.2f} to {100 * d.high:+.2f})"
                  for d in (comparison.top1, comparison.top5))  # fmt: skip
    lines = [
        f"ensemble - {best}, the best member: top-1 error {top1} points, top-5 {top5}",
        "95 % intervals: of errors Wilson's, of differences percentiles of a bootstrap over the same images "
        f"({DRAWS:,} draws)",
    ]
    if comparison.left_out:
        lines.append(f"{len(comparison.left_out)} images that some member could not read are left out of all")
    return lines
