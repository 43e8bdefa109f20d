"""The verbs of the product, one function each. Heavy imports wait inside a verb, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence

from pipeline.cli import average, bench, evaluate, export, launch, preflight, report, reproduce, runs, shards, sync
from pipeline.cli.codes import FAILED, RESUMABLE, code_of, line_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 usage or config, 3 data, 75 interrupted and resumable, 1 other."""
    options = _parsed(arguments)
    verb: Callable[[argparse.Namespace], int] = options.verb
    try:
        return verb(options)
    except KeyboardInterrupt:
        way_on = "; the same command goes on from there" if options.goes_on else ""
        print(f"pipeline: interrupted{way_on}", file=sys.stderr)
        return RESUMABLE if options.goes_on else FAILED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return FAILED
        code = code_of(error)
        if code is None:
            raise
        if code == RESUMABLE and not options.goes_on:
            code = FAILED  # nothing is kept of it
        print(f"pipeline: {line_of(error)}", file=sys.stderr)
        return code


def _reader_has_left() -> bool:
    """Whether nobody reads what is printed any more, as behind `| head`; the rest of it then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    has_left = any(event & select.POLLERR for _, event in poll.poll(0))
    if has_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_left


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line. Overrides may stand behind an option, too, where argparse stops looking."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)  # for a verb that starts itself again
    words: list[str] | None = getattr(options, "words", None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words.extend(rest)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pipeline",
        description="Distributed training in which an interrupted run is the same run.",
        epilog="example: pipeline train recipe=bn_x5 data=digits cluster.devices=2",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    runs.add_verbs(verbs)
    evaluate.add_verbs(verbs)
    average.add_verbs(verbs)
    preflight.add_verbs(verbs)
    launch.add_verbs(verbs)
    report.add_verbs(verbs)
    reproduce.add_verbs(verbs)
    export.add_verbs(verbs)
    sync.add_verbs(verbs)
    for room, purpose in ((shards, "pack images, index tars of others, check and look at them"),
                          (bench, "measure this machine, ours beside others")):  # fmt: skip
        name = room.__name__.rpartition(".")[2]
        room.add_verbs(verbs.add_parser(name, help=purpose).add_subparsers(required=True, metavar="VERB"))
    return parser
