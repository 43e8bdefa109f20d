"""What is to be packed: classes and, for each split, samples in sorted order; a sample is bytes in some file."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.shards import ClassName

EVALUATED = ("val", "validation", "test")  # names of the split to validate on; of several, the first is taken


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a source. name: its path there. file, offset, length: its bytes.

    member: its name inside a zip, or its row in a table.
    """

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
class Table:
    """A parquet file, whose images are spooled before they can be read. fingerprint: stands for all its bytes."""

    path: str
    column: str  # of the images
    rows: int
    bytes: int  # of the images, with the headers of their pages
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Source:
    """Everything to be packed: classes in the order of their labels, samples of each split sorted by name."""

    classes: list[ClassName]
    splits: dict[str, list[Sample]]
    remarks: tuple[str, ...] = ()  # what was left out
    tables: tuple[Table, ...] = ()  # where the samples are rows of parquet files: all of those
