"""What an experiment is: a claim with its source, a measurement, and how it is told.

To add one: a module of this room that ends in EXPERIMENT, and its line in catalog.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.report.chart import Figure

Measured = dict[str, Any]
"""Numbers, text, lists, and objects of them, as JSON takes them: all that tables and pictures are made of."""


@dataclass(frozen=True, slots=True)
class Table:
    """rows: as they are shown, the first column a name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came out. holds: whether the claim does here, None where that is open. said: so, in a sentence or two.

    figures: the first one is the picture of the experiment where there is room for one.
    """

    holds: bool | None
    said: str
    tables: Sequence[Table]
    figures: Sequence[Figure]
    remarks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """How it is run. data: places of images by their page in conf/data/; none = what needs nothing.

    work: a directory for what goes on when the same is asked again. full: at the size of the claim, for a GPU.
    device: cpu or cuda. progress: (done, of, what is going on).
    """

    seeds: int
    work: Path
    data: Mapping[str, str] = field(default_factory=dict)
    full: bool = False
    device: str = "cpu"
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, what: None)

    @property
    def shards(self) -> Path:
        """Of all experiments: images are packed once."""
        return self.work.parent / "shards"


@dataclass(frozen=True, slots=True)
class Experiment:
    """name: of its module. minutes: on two CPU cores, measured. seeds: by default. full: what --full makes of it.

    data: pages of conf/data/ that it can train on, the first of them the default for --data. large: those of them that
    take more than minutes, and --full.
    measure: raises DataError for images, FailedRunError for a training that failed for another reason than its numbers,
    and KeyboardInterrupt with what is done kept in the setting's work.
    tell: from what measure gave, after a way through JSON.
    """

    name: str
    title: str
    claim: str
    source: str
    minutes: float
    seeds: int
    full: str
    measure: Callable[[Setting], Measured]
    tell: Callable[[Measured], Finding]
    data: Sequence[str] = ()
    large: Sequence[str] = ()
