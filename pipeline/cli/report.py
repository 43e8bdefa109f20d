"""pipeline report: one run, or several side by side, as a page to look at, here or in Weights & Biases."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb, fraction
from pipeline.cli.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.dashboards.comparison import Comparison
    from pipeline.dashboards.place import Place
    from pipeline.report.record import Run


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "report", report, "a page and pictures of a run, or of several side by side; also while they go on",
        "pipeline report runs/first\n"
        "  pipeline report runs/inception runs/bn_baseline runs/bn_x5 --target 0.72 --output comparison\n"
        "  pipeline report --wandb runs/inception runs/bn_baseline runs/bn_x5 --target 0.72",
    )  # fmt: skip
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory; the first is what others are compared to")
    p.add_argument("--output", metavar="DIR", help="where to write (default: report/ in the first run's directory)")
    p.add_argument("--target", type=fraction, action="append", default=[], metavar="F", help="validation top-1 to be "
                   "reached, as 0.9; may be repeated (default: the best of the first run)")  # fmt: skip
    p.add_argument("--no-ledger", action="store_true", help="leave out the check that no sample was used twice in an "
                   "epoch, which reads all of ledger/")  # fmt: skip
    wandb = p.add_argument_group("in Weights & Biases")
    wandb.add_argument("--wandb", action="store_true", help="instead of a page here: a workspace for all runs of their "
                       "project, and a report that compares these by recipe; a later call renews both")  # fmt: skip
    wandb.add_argument("--project", metavar="[ENTITY/]PROJECT", help="where (default: tracking.* of the runs)")
    wandb.add_argument("--dry-run", action="store_true", help="ask no server; print what both would hold, as JSON")
    p.set_defaults(parser=p)


def report(options: argparse.Namespace) -> int:
    if options.wandb:
        return _report_in_wandb(options)
    for name, given in (("--project", options.project), ("--dry-run", options.dry_run)):
        if given:
            options.parser.error(f"{name} is of --wandb; add that, or leave it out")
    from pipeline.report.making import make_report

    with Progress("reading", "bytes of ledger") as progress:
        page = make_report(
            [Path(run) for run in options.runs], Path(options.output) if options.output else None,
            targets=options.target, with_ledger=not options.no_ledger,
            command=shlex.join(["pipeline", *options.arguments]), progress=progress,
        )  # fmt: skip
    print(f"{page}, and pictures beside it")
    return DONE


def _report_in_wandb(options: argparse.Namespace) -> int:
    for name, given in (("--output", options.output), ("--no-ledger", options.no_ledger)):
        if given:
            options.parser.error(f"{name} is of the page that is made here; leave it or --wandb out")
    from pipeline.dashboards.comparison import compare
    from pipeline.dashboards.place import named_place, place_of
    from pipeline.dashboards.specification import WORKSPACE
    from pipeline.report.making import default_targets, read_runs

    runs = read_runs([Path(run) for run in options.runs])
    place = named_place(options.project) if options.project else place_of(runs)
    comparison = compare(runs, options.target or default_targets(runs)[-1:])
    if options.dry_run:
        content = {"place": asdict(place), "workspace": asdict(WORKSPACE), "report": asdict(comparison)}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return DONE
    there = f" tracking.project={place.project}" if options.project else ""
    there += f" tracking.entity={place.entity}" if options.project and place.entity else ""
    return _publish(place, comparison, runs, there)


def _publish(place: Place, comparison: Comparison, runs: Sequence[Run], there: str) -> int:
    """there: what `pipeline sync` is to be told of the place, where the runs' configs do not name it."""
    from pipeline.dashboards.place import DashboardError

    try:
        from pipeline.dashboards.publishing import publish, unsent
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("wandb_workspaces"):
            raise
        raise DashboardError("wandb-workspaces is not installed; pip install wandb-workspaces, or see what it would "
                             "make with --dry-run") from None  # fmt: skip
    for saved in publish(place, comparison):
        print(f"{saved.what} {'made' if saved.is_new else 'renewed'}: {saved.address}")
    for run in unsent(place, runs):
        way_out = f"pipeline sync {run.directory}{there}"
        print(f"W&B has no row of {run.name} yet; send them with: {way_out}", file=sys.stderr)
    return DONE
