"""metrics.csv, the durable journal of a run: one row for each logged step and each validation."""

from __future__ import annotations

import contextlib
import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True, slots=True)
class Row:
    """step: optimizer steps taken. split: train or val. top1, top5: fractions. data_wait: share of the time."""

    step: int
    epoch: float
    split: str
    loss: float
    top1: float
    top5: float
    images: int
    rate: float | None = None
    images_per_s: float | None = None
    data_wait: float | None = None
    seconds: float | None = None


COLUMNS = [f.name for f in fields(Row)]


class Journal:
    """Appends rows to a csv, each handed to the system before the next step; floats keep all their digits."""

    def __init__(self, path: Path, *, from_step: int):
        """Continue after step `from_step`: rows of later steps were undone with their steps, and are cut."""
        kept = [row for row in read_journal(path) if row.step <= from_step] if path.exists() else []
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(_text(row) for row in kept)
        temporary.replace(path)
        self._seen = {(row.step, row.split) for row in kept}
        self._file: TextIO = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def append(self, row: Row) -> None:
        if (row.step, row.split) in self._seen:  # a finished run that is started again repeats its last validation
            return
        self._writer.writerow(_text(row))
        self._file.flush()

    def interrupted(self) -> None:
        """Every row is written as it comes."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: `append` has said so
            self._file.close()


def read_journal(path: Path) -> list[Row]:
    """All rows; a last line that a crash cut short is left out."""
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            try:
                optional = {name: float(text) if (text := line[name]) else None for name in COLUMNS[7:]}
                rows.append(
                    Row(
                        step=int(line["step"]), epoch=float(line["epoch"]), split=line["split"],
                        loss=float(line["loss"]), top1=float(line["top1"]), top5=float(line["top5"]),
                        images=int(line["images"]), **optional,
                    )
                )  # fmt: skip
            except (TypeError, ValueError):
                continue
    return rows


def _text(row: Row) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in asdict(row).items()}
