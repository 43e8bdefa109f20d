"""What is told, how often, and that it arrives by the real client."""

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import wandb
from wandb.automations import ProjectScope, SlackIntegration
from wandb.automations._inputs import prepare_to_create

from pipeline.callbacks import wandb_reporter
from pipeline.callbacks.alerts import HOUR, Alerts
from pipeline.callbacks.journal import Row
from pipeline.callbacks.segments import segments
from pipeline.config import compose_config
from pipeline.launch.plan import RunRecord
from pipeline.run.watching import build_alerts
from tests.callbacks.test_segments import records
from tests.callbacks.test_wandb_reporter import PLACE, begun, client, server

__all__ = ["client", "server"]
BEGAN = 1_790_000_000.0


class Told:
    """Takes alerts as W&B would, and is the clock."""

    def __init__(self, *, goodput: float = 0.0, name: str = "run"):
        self.told: list[tuple[str, str, str, float]] = []
        self.now = 0.0
        self.alerts = Alerts(self, name=name, directory=Path("runs/run"), command="pipeline train runs/run/config.yaml",
                             began=BEGAN, goodput=goodput, clock=lambda: self.now)  # fmt: skip

    def __call__(self, title, text, *, level, wait_seconds):
        self.told.append((title, text, level, wait_seconds))

    @property
    def titles(self) -> list[str]:
        return [title for title, *_ in self.told]


def row(goodput: float | None, at: float | None, step: int = 1) -> Row:
    return Row(step=step, epoch=0.1, split="train", loss=1, top1=0, top5=0, images=8, goodput=goodput, at=at)


def test_an_alert_says_where_the_run_is_and_how_it_goes_on():
    told = Told()
    told.alerts.bad_loss("the loss is no number in step 4")
    assert told.told == [("run: bad loss", "the loss is no number in step 4\nrun directory: runs/run\n"
                          "go on with: pipeline train runs/run/config.yaml", "ERROR", HOUR)]  # fmt: skip


def test_what_is_told_again_waits_and_what_is_another_matter_does_not():
    told = Told()
    for told.now in (0.0, HOUR - 1, HOUR):
        told.alerts.stall(f"rank 1 has stood still at {told.now}")
    told.alerts.bad_loss("nan")
    assert told.titles == ["run: stands still", "run: stands still", "run: bad loss"]


def test_goodput_is_told_of_after_an_hour_once_until_it_was_at_the_bound_again():
    told = Told(goodput=0.8)
    for number, (goodput, hours) in enumerate(
        [(0.1, 0.9), (0.9, 1.1), (0.7, 1.2), (0.6, 1.3), (0.8, 2.0), (0.5, 9.0)], 1
    ):
        told.now = hours * HOUR
        told.alerts.append(row(goodput, BEGAN + hours * HOUR, number))
    assert [text.partition(",")[0] for _, text, *_ in told.told] == [
        "goodput is 70.0% at step 3", "goodput is 50.0% at step 6",
    ]  # fmt: skip


@pytest.mark.parametrize(("bound", "goodput"), [(0.0, 0.0), (0.8, 0.8), (0.8, None)])
def test_without_a_bound_or_below_none_nothing_is_told(bound, goodput):
    told = Told(goodput=bound)
    told.alerts.append(row(goodput, BEGAN + 2 * HOUR))
    told.alerts.append(row(0.1, None))
    told.alerts.interrupted()
    assert told.told == []


def test_titles_are_as_short_as_wandb_wants_them():
    told = Told(name="n" * 100)
    told.alerts.bad_loss("x" * 9000)
    ((title, text, *_),) = told.told
    assert len(title) < 64
    assert title.endswith(": bad loss")
    assert len(text) < 2200


class Tracker:
    def __init__(self):
        self.told = []

    def alert(self, title, text, **_):
        self.told.append((title, text))


@pytest.mark.parametrize(
    ("ended", "allowed", "tells"),
    [
        (["failed"] * 4, 5, True),
        (["failed"] * 3, 5, False),
        (["failed"] * 4, 0, False),
        (["failed", "failed", "interrupted", "failed"], 5, False),
        (["failed", None, "failed", None], 5, True),  # killed, which notes nothing
        ([], 1, False),
        (["failed"], 1, True),
    ],
)
def test_the_last_start_before_a_refusal_tells_of_the_crash_loop(tmp_path, ended, allowed, tells):
    config = compose_config(["run.id=a", f"run.dir={tmp_path}", f"run.stalled_starts={allowed}"])
    at = datetime.now(tz=UTC).isoformat(timespec="seconds")
    record = RunRecord("id", [{"at": at, "step": 0, **({"ended": end} if end else {})} for end in [*ended, None]])
    tracker = Tracker()
    build_alerts(config, record, tracker)
    assert [title for title, _ in tracker.told] == ["a: crash loop"] * tells
    said = f"starts in a row that failed after step 0 and got no further: {len(ended)}; after {allowed} of them"
    assert all(said in text for _, text in tracker.told)


def alerts_of(reporter) -> Alerts:
    began = (datetime.now(tz=UTC) - timedelta(hours=2)).timestamp()
    return Alerts(reporter.alert, name="run", directory=reporter.directory, command="go on", began=began, goodput=0.9)


def tell_all(alerts: Alerts) -> None:
    for _ in range(2):
        alerts.bad_loss("the loss is no number")
        alerts.stall("rank 1 has stood still")
        alerts.crash_loop(4, 7, 5)
        alerts.append(row(0.5, time.time()))


def test_each_alert_arrives_once(server, tmp_path):
    reporter = begun(tmp_path)
    tell_all(alerts_of(reporter))
    reporter.close()
    found = {alert["title"]: (alert["severity"], alert["waitDuration"]) for alert in server.run.alerts}
    assert len(server.run.alerts) == 4
    hour = 3_600_000
    assert found == {
        "run: bad loss": ("ERROR", hour), "run: stands still": ("WARN", hour), "run: crash loop": ("ERROR", hour),
        "run: low goodput": ("WARN", 6 * hour),
    }  # fmt: skip
    assert all(f"run directory: {tmp_path}" in alert["text"] for alert in server.run.alerts)


def test_an_alert_is_what_the_clients_own_would_be(server, tmp_path):
    reporter = begun(tmp_path)
    reporter._run.alert("title", "text", level="WARN", wait_duration=90.0)
    reporter.alert("title", "text", level="WARN", wait_seconds=90.0)
    reporter.close()
    first, second = server.run.alerts
    assert first == second


def test_an_offline_run_keeps_no_alert_for_a_later_sync(tmp_path):
    reporter = begun(tmp_path, mode="offline")
    tell_all(alerts_of(reporter))
    reporter.close()
    wandb.teardown()
    (segment,) = segments(tmp_path, PLACE.id)
    assert "alert" not in {record["type"] for record in records(segment.path)}


@pytest.mark.parametrize("fault", [30.0, 500, 401])
def test_no_fault_of_an_alert_holds_up_the_run_or_its_end(monkeypatch, server, tmp_path, fault):
    monkeypatch.setattr(wandb_reporter, "ALERT_SECONDS", 1.0)
    server.fault = {"NotifyScriptableRunAlert": fault}
    said: list[str] = []
    reporter = begun(tmp_path, said=said)
    began = time.monotonic()
    tell_all(alerts_of(reporter))
    reporter.append(row(0.5, 1.0))
    assert time.monotonic() - began < 0.5
    reporter.close()
    assert time.monotonic() - began < 10
    assert server.calls["NotifyScriptableRunAlert"] == 4
    assert len(server.run.history) == 1
    assert not said


def test_the_lines_of_the_page_build_an_automation_that_the_client_accepts(monkeypatch):
    made = []

    class Api:
        def slack_integrations(self, entity):
            yield SlackIntegration(id="SW50ZWdyYXRpb246MTI=", team_name=entity, channel_name="runs")

        def project(self, name, entity):
            return ProjectScope(id="UHJvamVjdDp2MTpwOmU=", name=name)

        def create_automation(self, automation, **more):
            more.pop("fetch_existing")
            made.append(prepare_to_create(automation, **more))

    monkeypatch.setattr(wandb, "Api", Api)
    page = Path(__file__).parents[2] / "docs" / "alerts.md"
    (lines,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(lines, {})
    (automation,) = made
    assert automation.name == "a run failed"
    assert automation.triggering_event_type == "RUN_STATE"
    assert "FAILED" in automation.model_dump_json()


def test_the_page_names_every_alert():
    page = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
    told = Told()
    tell_all(told.alerts)
    told.alerts.goodput = 0.9
    told.alerts.append(row(0.1, BEGAN + 2 * HOUR))
    assert {f"RUN: {title.removeprefix('run: ')}" for title in told.titles} == set(re.findall(r"`(RUN: [^`]+)`", page))
