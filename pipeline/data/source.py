"""What is to be packed: classes and, for each split, samples in sorted order; a sample is bytes in some file."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.shards import ClassName


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a source. name: its path there. file, offset, length: its bytes; member: its name inside a zip."""

    name: str
    label: int
    file: str
    offset: int = 0
    length: int = 0
    member: str = ""

    @property
    def place(self) -> str:
        """Where it lies, for a message: the file, or FILE:NAME inside one that holds many."""
        return self.file if self.file.endswith(self.name) else f"{self.file}:{self.name}"


@dataclass(frozen=True, slots=True)
class Source:
    """Everything to be packed: classes in the order of their labels, samples of each split sorted by name."""

    classes: list[ClassName]
    splits: dict[str, list[Sample]]
    remarks: tuple[str, ...] = ()  # what was left out
