"""pipeline doctor: is this run going to work?"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from pipeline.cli.nodes import doctor_nodes
from pipeline.cli.options import add_verb, seconds

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.doctor.findings import Finding

    Say = Callable[[str], None]  # told what is being looked at


NOT_SUBMITTED = "pipeline: not submitted; mend what is at fault, or submit it all the same with --force"


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "doctor", doctor, "look for what would keep a run from working; trains nothing, leaves nothing behind",
        "pipeline doctor recipe=bn_x5 data=digits cluster.devices=2\n"
        "  pipeline doctor runs/first/config.yaml --json\n"
        "  pipeline doctor --nodes recipe=bn_x5 data=imagenet cluster=slurm_4x8 slurm.partition=gpu\n\n"
        "exit codes: 0 go (with warnings or without), 2 a fault in config or environment, 3 in data",
    )  # fmt: skip
    p.add_argument(
        "words", nargs="*", metavar="key=value | RUN/config.yaml", help="as for train: overrides, or a frozen config"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("--nodes", action="store_true", help="let every rank look from where it stands, as a job of its own "
                   "where the run goes through Slurm, else on this machine")  # fmt: skip
    p.add_argument("--timeout", type=seconds, default=None, metavar="SECONDS", help="with --nodes: how long ranks may "
                   "take to come (default: 120)")  # fmt: skip


def doctor(options: argparse.Namespace) -> int:
    if options.nodes:
        return doctor_nodes(options)
    if options.timeout:
        from pipeline.config import ConfigError

        raise ConfigError(f"--timeout {options.timeout:g} is for ranks to come, which --nodes starts; add that, or "
                          "leave it out")  # fmt: skip
    from pipeline.doctor import report

    def examination(say: Say) -> Iterable[Finding]:
        from pipeline.doctor.examination import examine  # torch and Lightning: seconds, and broken ones end there

        return examine(options.words, say)

    began = time.monotonic()
    found = _findings(examination)
    took = time.monotonic() - began
    if options.json:
        print(json.dumps(report.as_json(options.words, found, took), indent=2))
    else:
        _print_report(found, took)
    return report.exit_code(found)


def before_submission(config: Config, script: str, *, whole: bool) -> int:
    """What the doctor says of a run and the script of its job or container, on stderr; returns the exit code, 0 for go.

    whole: the table, whatever is in it; else that of faults, or a line for each warning.
    """
    from pipeline.doctor import report
    from pipeline.doctor.findings import WARNING

    def examination(say: Say) -> Iterable[Finding]:
        from pipeline.doctor.examination import examine_run

        return examine_run(config, say, script=script, pace=False)  # a step here says nothing of the run's nodes

    began = time.monotonic()
    found = _findings(examination)
    code = report.exit_code(found)
    with contextlib.redirect_stdout(sys.stderr):
        if code or whole:
            _print_report(found, time.monotonic() - began)
        else:
            for line in report.lines([finding for finding in found if finding.state == WARNING]):
                print(line)
    return code


def _print_report(found: list[Finding], seconds: float) -> None:
    from pipeline.doctor.report import verdict

    _print_table(found)
    print(verdict(found, seconds))


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
def _status() -> Iterator[Say]:
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


def _findings(examination: Callable[[Say], Iterable[Finding]]) -> list[Finding]:
    """Of the versions, and then of an examination, if they allow it."""
    with _status() as say, contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
        return _found(examination, say)


def _found(examination: Callable[[Say], Iterable[Finding]], say: Say) -> list[Finding]:
    from pipeline.doctor.findings import guarded
    from pipeline.doctor.versions import check_versions, malicious, requirements

    say("versions")
    found = guarded("versions", "packages", malicious)
    if found:
        return found  # such a package runs when it is imported, by whatever check
    found = guarded("versions", "packages", lambda: check_versions(requirements()))
    examined: list[Finding] = []

    def rest() -> list[Finding]:
        examined.extend(examination(say))  # those before a crash stay
        return []

    crash = guarded("versions", "examination", rest)
    return [*found, *examined, *crash]
