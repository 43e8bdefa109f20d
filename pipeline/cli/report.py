"""pipeline report: one run, or several side by side, as a page to look at."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb, fraction
from pipeline.cli.progress import Progress


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "report", report, "a page and pictures of a run, or of several side by side; also while they go on",
        "pipeline report runs/first\n"
        "  pipeline report runs/inception runs/bn_baseline runs/bn_x5 --target 0.72 --output comparison",
    )  # fmt: skip
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory; the first is what others are compared to")
    p.add_argument("--output", metavar="DIR", help="where to write (default: report/ in the first run's directory)")
    p.add_argument("--target", type=fraction, action="append", default=[], metavar="F", help="validation top-1 to be "
                   "reached, as 0.9; may be repeated (default: the best of the first run)")  # fmt: skip
    p.add_argument("--no-ledger", action="store_true", help="leave out the check that no sample was used twice in an "
                   "epoch, which reads all of ledger/")  # fmt: skip


def report(options: argparse.Namespace) -> int:
    from pipeline.report.making import make_report

    with Progress("reading", "bytes of ledger") as progress:
        page = make_report(
            [Path(run) for run in options.runs], Path(options.output) if options.output else None,
            targets=options.target, with_ledger=not options.no_ledger,
            command=shlex.join(["pipeline", *options.arguments]), progress=progress,
        )  # fmt: skip
    print(f"{page}, and pictures beside it")
    return DONE
