"""metrics.csv, the durable journal of a run: one row for each logged step and each validation."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """What is known at a step. Names, units and meaning: metrics.py, docs/metrics.md. None: not known, or not there."""

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
    samples: float | None = None
    statistics_wait: float | None = None
    gradient_wait: float | None = None
    checkpoint_wait: float | None = None
    span: float | None = None
    mfu: float | None = None
    memory_gb: float | None = None
    goodput: float | None = None
    at: float | None = None
    ranks: float | None = None
    nodes: float | None = None
    slowest_rank: float | None = None
    slowest_over_median: float | None = None
    slowest_data_rank: float | None = None
    running_loss: float | None = None
    running_top1: float | None = None
    running_top5: float | None = None
    trained_loss: float | None = None
    trained_top1: float | None = None
    trained_top5: float | None = None


COLUMNS = [f.name for f in fields(Row)]


class Journal:
    """Appends rows to a csv, each handed to the system before the next step; floats keep all their digits."""

    def __init__(self, path: Path, *, from_step: int):
        """Continue after step `from_step`: rows of later steps were undone with their steps, and are cut."""
        found = read_journal(path) if path.exists() else []
        kept = [row for row in found if row.step <= from_step]
        self.undone = max((row for row in found if row.step > from_step), key=lambda row: row.step, default=None)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(_text(row) for row in kept)
        temporary.replace(path)
        self._seen = {(row.step, row.split) for row in kept}
        self._path = path

    def append(self, row: Row) -> None:
        if (row.step, row.split) in self._seen:  # a finished run that is started again repeats its last validation
            return
        # Closed after each: a file server or a mounted bucket gets what is closed, and a kill would leave it nothing.
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(_text(row))

    def interrupted(self) -> None:
        """Every row is written as it comes."""

    def close(self) -> None:
        """Every row is closed as it comes."""


def read_journal(path: Path) -> list[Row]:
    """All rows; a last line that a crash cut short is left out. Columns that an older version lacks are None."""
    text = path.read_text()
    lines = csv.reader(text[: text.rfind("\n") + 1].splitlines())
    header = next(lines, [])
    if not set(COLUMNS[:7]) <= set(header):
        return []
    at = {name: header.index(name) for name in COLUMNS if name in header}
    optional = [(name, at[name]) for name in COLUMNS[7:] if name in at]
    step, epoch, split, loss, top1, top5, images = (at[name] for name in COLUMNS[:7])
    rows = []
    for line in lines:
        try:
            rows.append(
                Row(
                    int(line[step]), float(line[epoch]), line[split], float(line[loss]), float(line[top1]),
                    float(line[top5]), int(line[images]),
                    **{name: float(line[i]) if line[i] else None for name, i in optional},
                )
            )  # fmt: skip
        except (IndexError, ValueError):
            continue
    return rows


def _text(row: Row) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in asdict(row).items()}
