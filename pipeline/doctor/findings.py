"""What a check has found: a name, a state, a line, and from a fault the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pipeline.launch.redaction import without_secrets

OK, WARNING, FAULT = "ok", "warning", "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    section: config, versions, data, arithmetic, directory, tracking, machine, slurm, docker, skypilot,
    pace, nodes, network.
    """

    name: str
    state: str  # ok, warning or fault
    text: str
    way_out: str = ""
    section: str = ""


def ok(name: str, text: str) -> Finding:
    return Finding(name, OK, text)


def warning(name: str, text: str, way_out: str) -> Finding:
    return Finding(name, WARNING, text, way_out)


def fault(name: str, text: str, way_out: str) -> Finding:
    return Finding(name, FAULT, text, way_out)


def of_message(name: str, message: object, state: str = FAULT) -> Finding:
    """The finding of an error of ours, whose line is `what is wrong; way out`."""
    text, semicolon, way_out = str(message).strip().partition("; ")
    return Finding(name, state, text, way_out if semicolon else "see `pipeline train --help`")


def counted(number: int, word: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def guarded(section: str, name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds, in its section. One that crashes is a fault of its own name, never a traceback."""
    try:
        found = list(check())
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no more is known"]
        found = [fault(name, f"the check itself failed: {type(error).__name__}: {lines[0][:200]}",
                       "look at what it names; the other checks stand")]  # fmt: skip
    return [replace(f, section=section, text=without_secrets(f.text), way_out=without_secrets(f.way_out))
            for f in found]  # fmt: skip
