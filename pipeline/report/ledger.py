"""What a run's ledger says: whether every epoch has every sample once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict


class Line(TypedDict):
    """As callbacks/ledger.py writes it."""

    epoch: int
    step: int
    keys: list[str]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch over all ranks. samples: of all steps. twice: of them, those that had been there before."""

    epoch: int
    steps: int
    samples: int
    twice: int


def read_ledger(directory: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Epoch]:
    """Every epoch in turn, so that no more than the keys of one are held. progress: (bytes read, bytes in all)."""
    paths = sorted(directory.glob("rank-*.jsonl"))
    total, done = sum(path.stat().st_size for path in paths), 0
    files = [_Lines(path) for path in paths]
    found = []
    while waiting := [file.next["epoch"] for file in files if file.next is not None]:
        epoch, seen, steps, samples = min(waiting), set[str](), set[int](), 0
        for file in files:
            for line in file.of_epoch(epoch):
                seen.update(line["keys"])
                samples += len(line["keys"])
                steps.add(line["step"])
        found.append(Epoch(epoch, len(steps), samples, samples - len(seen)))
        done = sum(file.bytes for file in files)
        progress(done, total)
    return found


class _Lines:
    """A rank's file, one line ahead. Lines that a crash cut short, or that are none, are left out."""

    def __init__(self, path: Path):
        self.bytes = 0
        self._file = path.open("rb")
        self.next = self._read()

    def of_epoch(self, epoch: int) -> Iterator[Line]:
        while self.next is not None and self.next["epoch"] == epoch:
            yield self.next
            self.next = self._read()

    def _read(self) -> Line | None:
        for text in self._file:
            self.bytes += len(text)
            try:
                line = json.loads(text)
                if text.endswith(b"\n") and {"epoch", "step", "keys"} <= line.keys():
                    return line  # type: ignore[no-any-return]
            except (ValueError, AttributeError):
                continue
        self._file.close()
        return None
