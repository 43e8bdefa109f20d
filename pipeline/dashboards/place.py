"""The project of W&B in which runs are, by their configs or by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.record import Run


class PlaceError(Exception):
    """No one project; the message says why, and the way out."""


class DashboardError(Exception):
    """W&B does not have the pages; the message says why, and the way out."""


@dataclass(frozen=True, slots=True)
class Place:
    """A project of W&B. entity: None for that of the key."""

    entity: str | None
    project: str

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}" if self.entity else self.project


def named_place(text: str) -> Place:
    """The project that [ENTITY/]PROJECT names. Raises PlaceError."""
    *above, project = (part.strip() for part in text.split("/"))
    if len(above) > 1 or not all([*above, project]):
        raise PlaceError(f"--project {text} is no project of W&B; write ENTITY/PROJECT, as its page has it")
    return Place(above[0] if above else None, project)


def place_of(runs: Sequence[Run]) -> Place:
    """The project that all of these runs name. Raises PlaceError."""
    places = {run.name: _place(run) for run in runs}
    first = places[runs[0].name]
    for name, place in places.items():
        if place != first:
            raise PlaceError(f"{runs[0].name} is tracked in {first}, {name} in {place}; name one with --project "
                             "ENTITY/PROJECT, or give runs of one project")  # fmt: skip
    return first


def _place(run: Run) -> Place:
    entity, project = run.config.get("tracking.entity"), run.config.get("tracking.project")
    if not project:
        raise PlaceError(f"{run.name} has no tracking.project in its config; name one with --project ENTITY/PROJECT")
    return Place(str(entity) if entity else None, str(project))
