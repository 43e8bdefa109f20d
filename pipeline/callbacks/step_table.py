"""A csv beside metrics.csv whose lines begin with a step: what was looked at, at single steps of the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


class StepTable:
    """A file that grows line by line, and after a restart holds nothing of steps that were undone."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns

    def begin(self, step: int) -> None:
        """Go on after step: lines of later ones are cut, and so is one that a crash cut short."""
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)[1:] if self.path.exists() else []
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w") as file:
            file.write(",".join(self.columns) + "\n")
            file.writelines(line for line in lines if _is_kept(line, step))
        temporary.replace(self.path)

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Each row begins with its step. Floats are written in four digits."""
        with self.path.open("a") as file:
            file.writelines(",".join(map(_text, row)) + "\n" for row in rows)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_kept(line: str, last_step: int) -> bool:
    """Whether it is whole, and of a step that was not undone."""
    step = line.partition(",")[0]
    return line.endswith("\n") and step.isdigit() and int(step) <= last_step
