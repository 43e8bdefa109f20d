"""pipeline doctor: is this run going to work?"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.cli.options import add_verb

if TYPE_CHECKING:
    from pipeline.doctor.findings import Finding


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "doctor", doctor, "look for what would keep a run from working; starts nothing, leaves nothing behind",
        "pipeline doctor recipe=bn_x5 data=digits cluster.devices=2\n"
        "  pipeline doctor runs/first/config.yaml --json\n\n"
        "exit codes: 0 go (with warnings or without), 2 a fault in config or environment, 3 in data",
    )  # fmt: skip
    p.add_argument(
        "words", nargs="*", metavar="key=value | RUN/config.yaml", help="as for train: overrides, or a frozen config"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def doctor(options: argparse.Namespace) -> int:
    from pipeline.doctor import report

    began = time.monotonic()
    with _status() as say, contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
        found = _findings(options.words, say)
    seconds = time.monotonic() - began
    if options.json:
        print(json.dumps(report.as_json(options.words, found, seconds), indent=2))
    else:
        _print_table(found)
        print(report.verdict(found, seconds))
    return report.exit_code(found)


def _print_table(found: list[Finding]) -> None:
    try:
        from rich.console import Console

        from pipeline.doctor.table import table
    except ImportError:  # a fault that the table is to tell of
        from pipeline.doctor.report import lines

        print("\n".join(lines(found)))
        return
    Console(highlight=False).print(table(found))


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """What is being looked at, on the terminal while it lasts."""
    try:
        from rich.console import Console
    except ImportError:
        yield lambda name: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: None
        return
    with console.status("looking", spinner="line") as status:
        yield lambda name: status.update(f"looking at: {name}")


def _findings(words: list[str], say: Callable[[str], None]) -> list[Finding]:
    from pipeline.doctor.findings import guarded
    from pipeline.doctor.versions import check_versions, malicious, requirements

    say("versions")
    found = guarded("versions", "packages", malicious)
    if found:
        return found  # such a package runs when it is imported, by whatever check
    found = guarded("versions", "packages", lambda: check_versions(requirements()))
    examined: list[Finding] = []

    def rest() -> list[Finding]:
        from pipeline.doctor.examination import examine  # torch and Lightning: seconds, and broken ones end here

        examined.extend(examine(words, say))  # those before a crash stay
        return []

    crash = guarded("versions", "examination", rest)
    return [*found, *examined, *crash]
