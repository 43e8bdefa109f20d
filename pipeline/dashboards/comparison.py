"""A comparison of recipes: what its page in W&B says of runs, and which of them its panels show. Plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.dashboards.specification import COMPARED, Panel
from pipeline.report.accounting import best_top1, first_at
from pipeline.report.record import NotARunError, Run
from pipeline.report.words import NEVER, UNKNOWN, differing, duration, fraction, value_of

TITLE_LENGTH = 128  # that W&B takes


@dataclass(frozen=True, slots=True)
class RunSet:
    """Lines of one name. runs: ids in W&B."""

    name: str
    runs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """key: of which sets it is, in whatever order. scores, differences: Markdown, above and below the panels."""

    key: str
    title: str
    description: str
    scores: str
    run_sets: Sequence[RunSet]
    panels: Sequence[Panel]
    differences: str


def compare(runs: Sequence[Run], targets: Sequence[float]) -> Comparison:
    """The comparison of runs by recipe. targets: top-1 to be reached; NaN for none. Raises NotARunError."""
    for run in runs:
        if not run.wandb_id:
            raise NotARunError(f"{run.directory / 'run.json'} is missing or damaged: it has the id by which W&B knows "
                               "the run; leave that run out")  # fmt: skip
    sets: dict[str, list[str]] = {}
    for run in runs:
        sets.setdefault(_named(run, "recipe"), []).append(run.wandb_id)
    data = list(dict.fromkeys(_named(run, "data") for run in runs))
    return Comparison(
        key=f"{', '.join(sorted(sets))} on {', '.join(sorted(data))}",
        title=_short(f"{', '.join(sets)} on {', '.join(data)}"),
        description="Recipes side by side, made by `pipeline report --wandb`; the next call writes it anew.",
        scores=f"## Steps to target\n{_scores(runs, targets)}",
        run_sets=[RunSet(recipe, ids) for recipe, ids in sets.items()],
        panels=COMPARED,
        differences=f"## Config\n{_differences(runs)}",
    )


def _scores(runs: Sequence[Run], targets: Sequence[float]) -> str:
    """Figure 3 of Ioffe & Szegedy 2015: steps to the targets, and the most that was reached."""
    wanted = [target for target in targets if math.isfinite(target)]
    head = ["run", "recipe", "state", "steps"]
    for target in wanted:
        head += [f"steps to {fraction(target)}", "time", "× fewer steps"]
    rows = []
    for run in runs:
        row = [run.name, _named(run, "recipe"), run.state, f"{run.steps:,}"]
        for target in wanted:
            reached, reference = first_at(run, target), first_at(runs[0], target)
            ratio = f"{reference.step / reached.step:.3g}" if reference and reached and reached.step else UNKNOWN
            row += [f"{reached.step:,}", duration(reached.hours), ratio] if reached else [NEVER, UNKNOWN, UNKNOWN]
        rows.append([*row, fraction(best_top1(run))])
    return _table([*head, "best top-1"], rows)


def _differences(runs: Sequence[Run]) -> str:
    names = differing(runs)
    if not names:
        return "The runs have the same config." if len(runs) > 1 else "There is one run."
    rows = [[name, *(value_of(run, name) for run in runs)] for name in names]
    return _table(["key", *(run.name for run in runs)], rows)


def _named(run: Run, axis: str) -> str:
    return str(run.config.get(f"run.{axis}") or UNKNOWN)


def _short(title: str) -> str:
    return title if len(title) <= TITLE_LENGTH else f"{title[: TITLE_LENGTH - 1]}…"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Text that ends no cell of a table in Markdown, and is no HTML."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
