import re
import subprocess
import sys

import pytest

from pipeline.callbacks.metrics import OF_EACH_GPU, ONLY_IN_CSV, ONLY_IN_WANDB, SCORES, SPEED, SYSTEM
from pipeline.dashboards.specification import AXIS, COMPARED, WORKSPACE, documented

PANELS = [(section.name, panel) for section in WORKSPACE.sections for panel in section.panels]
PANELS += [("report", panel) for panel in COMPARED]


@pytest.mark.parametrize(("where", "panel"), PANELS, ids=lambda value: getattr(value, "title", value))
def test_every_metric_of_a_panel_is_documented(where, panel):
    names = documented()
    assert AXIS in names
    assert bool(panel.metrics) != bool(panel.pattern)
    assert set(panel.metrics) <= names


def test_what_is_in_the_csv_alone_is_on_no_panel():
    names = {name for _, panel in PANELS for name in panel.metrics}
    assert not {f"train/{metric.name}" for metric in ONLY_IN_CSV} & names


def test_columns_beside_runs_are_documented_metrics_and_keys_of_a_config():
    for column in WORKSPACE.columns:
        kind, _, name = column.partition(":")
        assert name in (documented() if kind == "summary" else ("run.recipe", "run.data"))


def test_every_figure_of_a_row_is_on_some_panel():
    shown = {name for _, panel in PANELS for name in panel.metrics}
    for metric in (*SCORES, *SPEED, *ONLY_IN_WANDB):
        assert {f"train/{metric.name}", f"val/{metric.name}"} & shown, metric.name


OF_NODES = [metric.name for metric in SYSTEM] + [f"gpu1_{metric.name}" for metric in OF_EACH_GPU]


@pytest.mark.parametrize("figure", OF_NODES)
def test_every_figure_of_a_node_is_on_one_panel(figure):
    name = f"system/{figure}/node-12"
    assert sum(bool(panel.pattern and re.search(panel.pattern, name)) for _, panel in PANELS) == 1


@pytest.mark.parametrize("name", ["percentiles/body.5b.pool/unit/p50", "percentiles/classifier/all/p15",
                                  "percentiles/classifier/all/p85", "gradients/body.0.conv/kurtosis"])  # fmt: skip
def test_what_is_seen_inside_a_network_is_on_one_panel(name):
    assert sum(bool(panel.pattern and re.search(panel.pattern, name)) for _, panel in PANELS) == 1


def test_titles_of_a_section_differ():
    for section in WORKSPACE.sections:
        assert len({panel.title for panel in section.panels}) == len(section.panels)


def test_the_specification_needs_no_wandb_and_no_torch():
    program = ("import sys, pipeline.dashboards.specification, pipeline.dashboards.comparison; "
               "print([name for name in ('wandb', 'wandb_workspaces', 'torch') if name in sys.modules])")  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
