"""Workspace and comparison as W&B keeps them: the JSON of its views, built by its own wandb-workspaces.

The library builds and does not send: its save() has no limit of time, makes a project where one is misspelt, and a new
report at each call. What it would ask a server for is an argument here, so nothing in this file needs a network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr
from wandb_workspaces.reports.v2 import internal

from pipeline.dashboards.comparison import Comparison, RunSet
from pipeline.dashboards.specification import AXIS, Panel, Section, Workspace

COLUMNS, WIDTH, HEIGHT = 3, 24, 6  # panels beside each other; the width of a report's grid, the height of a panel


def workspace_json(workspace: Workspace, entity: str, project: str) -> str:
    """The spec of a view of the type project-view."""
    built = ws.Workspace(
        entity=entity,
        project=project,
        name=workspace.name,
        sections=[_section(section) for section in workspace.sections],
        settings=ws.WorkspaceSettings(x_axis=workspace.axis),
        runset_settings=ws.RunsetSettings(pinned_columns=[_column(name) for name in workspace.columns]),
    )
    return str(built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def comparison_json(comparison: Comparison, entity: str, project: str, project_id: str) -> str:
    """The spec of a view of the type runs, which is a report. project_id: W&B's internal one."""
    grid = wr.PanelGrid(
        runsets=[_run_set(run_set) for run_set in comparison.run_sets],
        panels=[_placed(_plot(panel, "report"), number) for number, panel in enumerate(comparison.panels)],
    )
    built = wr.Report(
        entity=entity, project=project, title=comparison.title, description=comparison.description, width="fluid",
        blocks=[wr.MarkdownBlock(text=comparison.scores), grid, wr.MarkdownBlock(text=comparison.differences)],
    )  # fmt: skip
    model = built._to_model()
    for block in model.spec.blocks:
        if isinstance(block, internal.PanelGrid):
            for run_set in block.metadata.run_sets:  # which the library looks up by itself, with a client of its own
                run_set.project = internal.Project(name=project, entity_name=entity, id=project_id)
    return str(model.spec.model_dump_json(by_alias=True, exclude_none=True))


def _section(section: Section) -> Any:
    rows = -(-len(section.panels) // COLUMNS)
    return ws.Section(
        name=section.name,
        panels=[_plot(panel, section.name) for panel in section.panels],
        is_open=section.is_open,
        layout_settings=ws.SectionLayoutSettings(columns=COLUMNS, rows=rows),
        panel_settings=ws.SectionPanelSettings(x_axis=AXIS),
    )


def _plot(panel: Panel, where: str) -> Any:
    plot = wr.LinePlot(title=panel.title, x=AXIS, y=list(panel.metrics), metric_regex=panel.pattern or None)
    plot._id = stable_id("panel", where, panel.title)  # else a random one: the same page would differ at each call
    return plot


def _placed(plot: Any, number: int) -> Any:
    row, column = divmod(number, COLUMNS)
    width = WIDTH // COLUMNS
    plot.layout = wr.Layout(x=column * width, y=row * HEIGHT, w=width, h=HEIGHT)
    return plot


def _run_set(run_set: RunSet) -> Any:
    built = wr.Runset(name=run_set.name, filters=_any_of(run_set.runs))
    built._id = stable_id("runs", run_set.name)
    return built


def _any_of(runs: Sequence[str]) -> Any:
    return expr.And(expr.Metric("ID").isin(list(runs)))


def _column(name: str) -> str:
    """A key of a config is kept behind `.value` by its first part."""
    kind, _, key = name.partition(":")
    first, dot, rest = key.partition(".")
    return f"{kind}:{first}.value{dot}{rest}" if kind == "config" else name


def stable_id(*parts: str) -> str:
    """Twelve letters and digits, as W&B's own ids, and the same ones for the same parts."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]
