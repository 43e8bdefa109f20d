import json
import os
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.dashboards.comparison import compare
from pipeline.dashboards.place import DashboardError, Place
from pipeline.dashboards.publishing import publish
from pipeline.dashboards.specification import WORKSPACE
from pipeline.report.making import read_runs
from tests.callbacks.test_wandb_reporter import BlackHole, client, server
from tests.callbacks.wandb_server import KEY, StoredRun
from tests.report.runs import simple

__all__ = ["client", "server"]

GOLDEN = Path(__file__).parents[1] / "golden" / "dashboards.json"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs by paths that are the same wherever they lie."""
    monkeypatch.chdir(tmp_path)
    for name, best, slowness in (("bn_baseline", 0.8, 2), ("bn_x5", 0.9, 1)):
        simple(Path("runs") / name, best, slowness, run={"id": name, "recipe": name, "data": "digits"},
               tracking={"entity": None, "project": "vision"})  # fmt: skip
        record = Path("runs") / name / "run.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"wandb_id": f"id-{name}"}))
    return ["runs/bn_baseline", "runs/bn_x5"]


def metrics(spec: dict) -> set[str]:
    """Every name on a page, however deep."""
    found = set(spec.get("metrics", ()))
    for value in spec.values():
        for each in value if isinstance(value, list) else [value]:
            found |= metrics(each) if isinstance(each, dict) else set()
    return found


def test_a_dry_run_prints_the_specification_and_asks_nobody(capsys, server, runs):
    """Written anew by PIPELINE_WRITE_GOLDEN=1, to be read before it is committed."""
    assert cli.main(["report", "--wandb", "--dry-run", *runs]) == 0
    text = capsys.readouterr().out
    if os.environ.get("PIPELINE_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    assert not server.calls


def test_a_project_gets_a_workspace_and_a_report(capsys, server, runs):
    assert cli.main(["report", "--wandb", *runs]) == 0
    workspace, report = server.views
    assert (workspace.kind, workspace.title) == ("project-view", "pipeline")
    assert (report.kind, report.title) == ("runs", "bn_baseline, bn_x5 on digits")
    sections = workspace.spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [section.name for section in WORKSPACE.sections]
    assert metrics(workspace.spec) == {m for s in WORKSPACE.sections for p in s.panels for m in p.metrics}
    plots = [panel["config"] for section in sections for panel in section["panels"]]
    assert {plot["xAxis"] for plot in plots} == {"step"}
    said = capsys.readouterr().out.splitlines()
    address = server.environment["WANDB_BASE_URL"]
    assert said[0] == f"workspace made: {address}/someone/vision?nw={workspace.name[3:-2]}"
    assert said[1] == f"report made: {address}/someone/vision/reports/bn_baseline%2C-bn_x5-on-digits--Vmlldzo1"


def test_a_report_shows_the_runs_it_was_made_of_by_recipe(server, runs):
    assert cli.main(["report", "--wandb", *runs]) == 0
    (grid,) = [block for block in server.views[1].spec["blocks"] if block["type"] == "panel-grid"]
    sets = grid["metadata"]["runSets"]
    assert [each["name"] for each in sets] == ["bn_baseline", "bn_x5"]
    assert [each["filters"]["filters"][0]["value"] for each in sets] == [["id-bn_baseline"], ["id-bn_x5"]]
    assert {each["project"]["id"] for each in sets} == {"77"}
    texts = [block["content"] for block in server.views[1].spec["blocks"] if block["type"] == "markdown-block"]
    assert "| bn_x5 | bn_x5 | done | 40 | 20 |" in texts[0]


def test_a_second_call_renews_the_same_pages(capsys, server, runs):
    assert cli.main(["report", "--wandb", *runs]) == 0
    first = [(view.id, json.dumps(view.spec)) for view in server.views]
    capsys.readouterr()
    assert cli.main(["report", "--wandb", *runs]) == 0
    assert [(view.id, json.dumps(view.spec)) for view in server.views] == first
    assert [view.saves for view in server.views] == [2, 2]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "workspace renewed", "report renewed",
    ]  # fmt: skip


def test_other_recipes_are_another_report_in_the_same_workspace(server, runs):
    assert cli.main(["report", "--wandb", *runs]) == 0
    assert cli.main(["report", "--wandb", runs[1]]) == 0
    assert [view.title for view in server.views] == ["pipeline", "bn_baseline, bn_x5 on digits", "bn_x5 on digits"]


def test_a_project_can_be_named(capsys, server, runs):
    assert cli.main(["report", "--wandb", "--project", "team/other", *runs]) == 0
    assert "/team/other?nw=" in capsys.readouterr().out
    assert server.calls["Viewer"] == 0


def test_runs_that_wandb_lacks_are_named_with_how_to_send_them(capsys, server, runs):
    server.runs["id-bn_x5"] = StoredRun("vision", "id-bn_x5", history=[{"_step": 20}])
    assert cli.main(["report", "--wandb", *runs]) == 0
    assert capsys.readouterr().err == (
        "W&B has no row of bn_baseline yet; send them with: pipeline sync runs/bn_baseline\n"
    )


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--project", "a/b/c"], 2, "write ENTITY/PROJECT"),
        (["--project", "/b"], 2, "write ENTITY/PROJECT"),
        (["--output", "there"], 2, "--output is of the page that is made here"),
    ],
)
def test_what_is_asked_wrongly_is_said_in_one_line(capsys, server, runs, words, code, says):
    try:
        ended = cli.main(["report", "--wandb", *words, *runs])
    except SystemExit as ending:  # argparse
        ended = ending.code
    assert ended == code
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not server.views


@pytest.mark.parametrize("option", [["--dry-run"], ["--project", "a"]])
def test_options_of_wandb_need_it(capsys, runs, option):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", *option, *runs])
    assert "is of --wandb" in capsys.readouterr().err


def test_runs_of_two_projects_are_refused(capsys, server, runs):
    config = Path(runs[1]) / "config.yaml"
    config.write_text(config.read_text().replace("project: vision", "project: other"))
    assert cli.main(["report", "--wandb", *runs]) == 2
    assert "bn_baseline is tracked in vision, bn_x5 in other; name one with --project" in capsys.readouterr().err


def test_a_project_that_is_not_there_is_not_made(capsys, server, runs):
    server.projects = {"someone/else"}
    assert cli.main(["report", "--wandb", *runs]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipeline: W&B knows no project someone/vision")
    assert not server.views


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"every": 401}, "is the key right?"),
        ({"UpsertView": 500}, "answers with status 500"),
        ({"Views": 404}, "answers with status 404"),
    ],
)
def test_what_stops_a_server_is_said_in_one_line_without_the_key(capsys, server, runs, fault, says):
    server.fault = fault
    assert cli.main(["report", "--wandb", *runs]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert KEY not in line


def test_without_a_key_the_way_to_one_is_said(capsys, monkeypatch, server, runs):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "/nowhere")
    assert cli.main(["report", "--wandb", *runs]) == 1
    assert "set WANDB_API_KEY, or run `wandb login`" in capsys.readouterr().err


def test_a_server_that_never_answers_is_waited_for_so_long(monkeypatch, runs):
    comparison = compare(read_runs([Path(run) for run in runs]), [])
    with BlackHole() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(DashboardError, match=r"does not answer \(timed out\)"):
            publish(Place(None, "vision"), comparison, seconds=0.2)


def test_an_answer_that_is_none_is_said(capsys, monkeypatch, server, runs):
    monkeypatch.setattr(server, "UpsertView", lambda _: {"data": {}})
    assert cli.main(["report", "--wandb", *runs]) == 1
    assert "does not answer as a W&B server does" in capsys.readouterr().err


def test_without_the_library_there_is_a_line_and_the_dry_run(capsys, monkeypatch, server, runs):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for name in ("pipeline.dashboards.publishing", "pipeline.dashboards.views", "wandb_workspaces.reports.v2"):
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["report", "--wandb", *runs]) == 1
    assert "wandb-workspaces is not installed" in capsys.readouterr().err
    assert cli.main(["report", "--wandb", "--dry-run", *runs]) == 0
