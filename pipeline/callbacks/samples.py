"""system/node-<n>.csv, what a node did: written by a thread of that node, read by the leading rank and by reports."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.callbacks.machine import Figures

DIRECTORY = "system"  # of a run
_TAIL = 8192  # bytes, in which a line is sure to end and another to begin


class Table:
    """A node's file, gone on with: lines of earlier starts stay, since time is not undone as steps are.

    Raises OSError where the file is there and cannot be read: what it holds is not given up for that.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self._host = path, socket.gethostname()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(errors="replace") if path.exists() else ""
        before = next(_split(text.splitlines()[:1]), [])
        wanted = ("at", "host", *names)
        self.columns = (*wanted, *(name for name in before if name not in wanted))  # GPUs come, and go, and were there
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w") as file:
            file.write(",".join(self.columns) + "\n")
            for line in _whole(text):
                file.write(",".join(line.get(name, "") for name in self.columns) + "\n")
        temporary.replace(path)

    def append(self, sample: Figures) -> None:
        values = (f"{sample[name]:.4g}" if name in sample else "" for name in self.columns[2:])
        with self.path.open("a") as file:
            file.write(",".join([f"{time.time():.1f}", self._host, *values]) + "\n")


def whole_lines(path: Path) -> list[dict[str, str]]:
    """Samples of a node's file by column, without a line that a kill cut short; none where there is no such file."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return list(_whole(text))


def _whole(text: str) -> Iterator[dict[str, str]]:
    columns, *lines = [*_split(text[: text.rfind("\n") + 1].splitlines())] or [[]]
    for line in lines:
        sample = dict(zip(columns, line, strict=False))
        if len(line) == len(columns) and _number(sample.get("at")) is not None:
            yield sample


def _split(lines: Sequence[str]) -> Iterator[list[str]]:
    """Values have neither commas nor quotes; one damaged byte must not make a word of all that follows."""
    return (line.split(",") for line in lines)


class Nodes:
    """The files of all nodes, as far as this one sees them. directory: where they are."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._told: dict[str, str] = {}  # the time of the newest sample, by the name of its file

    def news(self) -> Figures:
        """The newest sample of each node that has one since the last call, by its names in W&B."""
        found: Figures = {}
        for path in sorted(self.directory.glob("node-*.csv")):
            with suppress(OSError, ValueError, LookupError, StopIteration):
                columns, line = _ends(path)
                sample = dict(zip(columns, line, strict=True))
                if self._told.get(path.name) != sample["at"]:
                    self._told[path.name] = sample["at"]
                    found |= {wandb_name(name, path.stem): float(sample[name]) for name in columns[2:] if sample[name]}
        return found


def _ends(path: Path) -> tuple[list[str], list[str]]:
    """The header and the newest whole line, without what is between: a file of a month has 15 to 41 MB."""
    with path.open("rb") as file:
        columns = file.readline().decode()
        begin = file.tell()
        end = file.seek(0, 2)
        file.seek(max(begin, end - _TAIL))
        tail = file.read().decode(errors="replace")
    whole = tail[: tail.rfind("\n") + 1].splitlines()
    return next(_split([columns.rstrip("\n")])), next(_split(whole[-1:]))


def wandb_name(name: str, node: str) -> str:
    """All nodes of a figure side by side: W&B draws them as one panel by the pattern system/cpu/.*"""
    return f"{DIRECTORY}/{name}/{node}"


def _number(text: str | None) -> float | None:
    with suppress(ValueError, TypeError):
        return float(text or "")
    return None
