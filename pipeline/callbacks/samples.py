"""system/node-<n>.csv, what a node did: written by a thread of that node, read by the leading rank and by reports."""

from __future__ import annotations

import csv
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.callbacks.machine import Figures

DIRECTORY = "system"  # of a run
_TAIL = 8192  # bytes, in which a line is sure to end and another to begin


class Table:
    """A node's file, gone on with: lines of earlier starts stay, since time is not undone as steps are."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.columns, self._host = path, ("at", "host", *names), socket.gethostname()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")  # GPUs may come and go
            writer.writeheader()
            writer.writerows(whole_lines(path))
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
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in csv.DictReader(lines) if None not in line and None not in line.values()
            and _number(line.get("at")) is not None]  # fmt: skip


class Nodes:
    """The files of all nodes, as far as this one sees them. directory: where they are."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._told: dict[str, str] = {}  # the time of the newest sample, by the name of its file

    def news(self) -> Figures:
        """The newest sample of each node that has one since the last call, by its names in W&B."""
        found: Figures = {}
        for path in sorted(self.directory.glob("node-*.csv")):
            with suppress(OSError, ValueError, LookupError, StopIteration, csv.Error):
                columns, line = _ends(path)
                sample = dict(zip(columns, line, strict=True))
                if self._told.get(path.name) != sample["at"]:
                    self._told[path.name] = sample["at"]
                    found |= {wandb_name(name, path.stem): float(sample[name]) for name in columns[2:] if sample[name]}
        return found


def _ends(path: Path) -> tuple[list[str], list[str]]:
    """The header and the newest whole line, without what is between: a file of a month has 15 MB."""
    with path.open("rb") as file:
        columns = file.readline().decode()
        begin = file.tell()
        end = file.seek(0, 2)
        file.seek(max(begin, end - _TAIL))
        tail = file.read().decode(errors="replace")
    whole = tail[: tail.rfind("\n") + 1].splitlines()
    return next(csv.reader([columns])), next(csv.reader(whole[-1:]))


def wandb_name(name: str, node: str) -> str:
    """All nodes of a figure side by side: W&B draws them as one panel by the pattern system/cpu/.*"""
    return f"{DIRECTORY}/{name}/{node}"


def _number(text: str | None) -> float | None:
    with suppress(ValueError, TypeError):
        return float(text or "")
    return None
