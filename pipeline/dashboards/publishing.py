"""Workspace and comparison sent to a project of Weights & Biases: made at the first call, renewed at each later one.

Nothing is kept here: both have names in the project that follow from what they show, so that a second call, of whoever
and wherever, finds those of the first one. What was changed in them by hand is lost then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from pipeline.callbacks.wandb_server import (
    ServerError,
    WandbPlace,
    app_address,
    asked,
    last_position_on_server,
    own_entity,
    understood,
)
from pipeline.dashboards.comparison import Comparison
from pipeline.dashboards.place import DashboardError, Place
from pipeline.dashboards.specification import WORKSPACE
from pipeline.dashboards.views import comparison_json, stable_id, workspace_json
from pipeline.report.record import Run

ANSWER_SECONDS = 30.0  # for one question
_WHOSE = "query Viewer { viewer { entity } }"
_LOOK = """query Views($entity: String, $project: String!, $type: String, $view: String) {
  project(name: $project, entityName: $entity) {
    internalId
    allViews(viewType: $type, viewName: $view) { edges { node { id name } } }
  }
}"""
_SAVE = """mutation UpsertView($id: ID, $entity: String, $project: String, $type: String, $name: String, $title: String,
    $description: String, $spec: String!) {
  upsertView(input: {id: $id, entityName: $entity, projectName: $project, type: $type, name: $name,
      displayName: $title, description: $description, spec: $spec, createdUsing: WANDB_SDK}) {
    view { id name }
    inserted
  }
}"""


@dataclass(frozen=True, slots=True)
class Saved:
    """A page of W&B. is_new: no earlier call has made it."""

    what: str
    address: str
    is_new: bool


def publish(place: Place, comparison: Comparison, *, seconds: float = ANSWER_SECONDS) -> list[Saved]:
    """Make or renew the workspace and the report of a project. seconds: for one answer. Raises DashboardError."""
    try:
        entity = place.entity or own_entity() or _entity(seconds)
        project = _Project(entity, place.project, seconds)
        return [project.workspace(), project.report(comparison)]
    except ServerError as error:
        raise DashboardError(str(error)) from None


def unsent(place: Place, runs: Sequence[Run], *, seconds: float = ANSWER_SECONDS) -> list[Run]:
    """The runs of which W&B has no row yet. Raises DashboardError."""

    def has_rows(run: Run) -> bool:
        there = WandbPlace(run.wandb_id, run.name, place.project, place.entity, None, ())
        return last_position_on_server(there, seconds=seconds) >= 0

    try:
        return [run for run in runs if not has_rows(run)]
    except ServerError as error:
        raise DashboardError(str(error)) from None


class _Project:
    def __init__(self, entity: str, project: str, seconds: float):
        self.entity, self.project, self.seconds = entity, project, seconds

    def workspace(self) -> Saved:
        # Named as the web page names its own, and found by what is between the two in the address.
        short = stable_id(self.entity, self.project, "workspace", WORKSPACE.name)
        name = f"nw-{short}-v"
        id_, _ = self._find("project-view", name)
        spec = workspace_json(WORKSPACE, self.entity, self.project)
        _, is_new = self._save(id_, "project-view", name, WORKSPACE.name, "", spec)
        return Saved("workspace", f"{self._address()}?nw={short}", is_new)

    def report(self, comparison: Comparison) -> Saved:
        name = stable_id(self.entity, self.project, "report", comparison.key)
        id_, project_id = self._find("runs", name)
        spec = comparison_json(comparison, self.entity, self.project, project_id)
        saved, is_new = self._save(id_, "runs", name, comparison.title, comparison.description, spec)
        title = quote(comparison.title.replace(" ", "-"))
        return Saved("report", f"{self._address()}/reports/{title}--{saved.rstrip('=')}", is_new)

    def _find(self, kind: str, name: str) -> tuple[str | None, str]:
        """A view's id, None where there is none of that name, and that of the project."""
        variables = {"entity": self.entity, "project": self.project, "type": kind, "view": name}
        project = asked("Views", _LOOK, variables, seconds=self.seconds).get("project")
        if not project:
            raise ServerError(
                f"W&B knows no project {self.entity}/{self.project}, or its key may not see it: send a run there "
                "first (pipeline sync RUN), or name another with --project ENTITY/PROJECT"
            )
        nodes = understood(lambda: [edge["node"] for edge in project["allViews"]["edges"]])
        found = [node["id"] for node in nodes if node.get("name") == name]
        return (str(found[0]) if found else None), str(understood(lambda: project["internalId"]))

    def _save(self, id_: str | None, kind: str, name: str, title: str, description: str, spec: str) -> tuple[str, bool]:
        variables = {"id": id_, "entity": self.entity, "project": self.project, "type": kind, "name": name,
                     "title": title, "description": description, "spec": spec}  # fmt: skip
        answer = asked("UpsertView", _SAVE, variables, seconds=self.seconds)
        return understood(lambda: (str(answer["upsertView"]["view"]["id"]), bool(answer["upsertView"]["inserted"])))

    def _address(self) -> str:
        return f"{app_address()}/{quote(self.entity)}/{quote(self.project)}"


def _entity(seconds: float) -> str:
    """That of the key, in which W&B has the runs that name none."""
    answer = asked("Viewer", _WHOSE, {}, seconds=seconds)
    entity = (answer.get("viewer") or {}).get("entity")
    if not entity:
        raise ServerError("W&B names no entity of this key: give it with --project ENTITY/PROJECT")
    return str(entity)
