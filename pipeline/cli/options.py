"""Options of the command line: one verb's parser, and the numbers that it takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, verb: Callable[..., int],
             purpose: str, example: str, *, goes_on: bool = False) -> argparse.ArgumentParser:  # fmt: skip
    """The parser of a verb, which gets its options next. goes_on: the same command continues what was interrupted."""
    parser = verbs.add_parser(
        name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(verb=verb, goes_on=goes_on)
    return parser


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def none_or_more(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0")
    return number


def repeats(text: str) -> int:
    number = int(text)
    if number < 5:
        raise argparse.ArgumentTypeError(f"{number} must be at least 5: fewer rounds show no spread")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0 seconds")
    return number


def gigabytes(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no size; 0 = no limit")
    return number


def fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return number
