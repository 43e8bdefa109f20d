import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb

from pipeline.callbacks import wandb_reporter
from pipeline.callbacks.journal import Journal, Row
from pipeline.callbacks.segments import position_of, segments
from pipeline.callbacks.wandb_reporter import TrackingError, WandbReporter
from pipeline.callbacks.wandb_server import ServerError, WandbPlace, last_position_on_server, wandb_mode
from tests.callbacks.test_segments import records
from tests.callbacks.wandb_server import KEY, WandbServer

PLACE = WandbPlace(id="abc123", name="run", project="tests", entity=None, group="g", tags=["t"])
RUN = [(step, split) for step in range(1, 13) for split in (("train", "val") if step % 5 == 0 else ("train",))]


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """No key, no server, and W&B's own process ended afterwards."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb_reporter, "INIT_SECONDS", 2.0)
    monkeypatch.setattr(wandb_reporter, "FINISH_SECONDS", 2.0)
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def row(step: int, split: str) -> Row:
    return Row(step=step, epoch=step / 10, split=split, loss=1 / step, top1=0.25, top5=1, images=8, rate=0.1)


def rows(upto: int, above: int = 0) -> list[Row]:
    return [row(step, split) for step, split in RUN if above < step <= upto]


def start(directory: Path, *, journal: list[Row] = (), rows: list[Row] = (), mode="auto", said=None) -> WandbReporter:
    """A start of the run, to its end."""
    reporter = begun(directory, journal=journal, mode=mode, said=said)
    for each in rows:
        reporter.append(each)
    reporter.close()
    wandb.teardown()  # an offline segment is whole when W&B's own process has ended
    return reporter


def begun(directory, *, journal=(), mode="auto", said=None) -> WandbReporter:
    say, path = print if said is None else said.append, directory / "metrics.csv"
    directory.mkdir(exist_ok=True)
    write(path, journal)
    return WandbReporter(PLACE, directory=directory, mode=mode, config={"seed": 0}, journal=path, say=say)


def write(path: Path, rows: list[Row]) -> None:
    """A journal of these rows."""
    path.unlink(missing_ok=True)
    journal = Journal(path, from_step=0)
    for each in rows:
        journal.append(each)
    journal.close()


def on_disk(directory: Path) -> list[tuple[int, str]]:
    """(step, split) of all rows over all segments."""
    positions = [position_of(each) for segment in segments(directory, PLACE.id) for each in segment.rows()]
    return [(at // 2, "val" if at % 2 else "train") for at in positions]


def test_auto_is_online_with_a_key_and_offline_without(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    assert wandb_mode("auto") == "offline"
    netrc.write_text("machine elsewhere.example login a password b\n")
    assert wandb_mode("auto") == "offline"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode("auto") == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("auto") == "online"
    assert wandb_mode("disabled") == "disabled"


def test_a_segment_holds_every_row_under_our_own_step(tmp_path):
    start(tmp_path, rows=rows(12))
    (segment,) = segments(tmp_path, PLACE.id)
    assert on_disk(tmp_path) == RUN
    last = segment.rows()[-1]
    assert last == {"step": 12, "epoch": 1.2, "train/loss": 1 / 12, "train/top1": 0.25, "train/top5": 1,
                    "train/rate": 0.1}  # fmt: skip


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("resumed_at", [4, 8])
def test_offline_segments_together_have_every_row_once_whatever_a_kill_left_of_them(tmp_path, kept, resumed_at):
    start(tmp_path, rows=rows(9))
    (segment,) = segments(tmp_path, PLACE.id)
    data = segment.path.read_bytes()
    segment.path.write_bytes(data[: int(len(data) * kept)])
    start(tmp_path, journal=rows(resumed_at), rows=rows(10, above=resumed_at))
    start(tmp_path, journal=rows(10), rows=rows(12, above=10))
    assert on_disk(tmp_path) == RUN


@pytest.mark.parametrize(("on_server", "resumed_at"), [(9, 4), (3, 8), (10, 10), (0, 6)])
def test_the_server_has_every_row_once_wherever_a_run_goes_on(server, tmp_path, on_server, resumed_at):
    start(tmp_path, rows=rows(on_server))
    start(tmp_path / "lost", journal=rows(resumed_at), rows=rows(12, above=resumed_at))  # another node: no segments
    assert list(server.runs) == [PLACE.id]
    assert server.steps() == RUN
    assert [line["_step"] for line in server.run.history] == sorted(2 * s + (split == "val") for s, split in RUN)


def test_rows_of_an_offline_start_reach_the_server_with_the_next_one_online(server, tmp_path):
    start(tmp_path, rows=rows(3))
    start(tmp_path, journal=rows(3), rows=rows(8, above=3), mode="offline")
    assert server.steps() == RUN[:3]
    start(tmp_path, journal=rows(8), rows=rows(12, above=8))
    assert server.steps() == RUN


def test_preemption_and_its_exit_code_arrive(server, tmp_path):
    for mode in ("online", "offline"):
        reporter = begun(tmp_path / mode, mode=mode)
        reporter.append(row(1, "train"))
        reporter.interrupted()
        reporter.close()
    assert server.run.preempting
    assert server.run.exit_code == wandb_reporter.RESUMABLE
    (segment,) = segments(tmp_path / "offline", PLACE.id)
    found = {record["type"]: record for record in records(segment.path)}
    assert "preempting" in found
    assert found["exit"]["exit"]["exit_code"] == wandb_reporter.RESUMABLE


class BlackHole:
    """Accepts connections and never says a word."""

    def __enter__(self) -> str:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=50)
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.mark.parametrize(
    ("fault", "mode"),
    [
        ("closed port", "auto"),
        ("black hole", "auto"),
        ("no name", "auto"),
        (401, "auto"),
        (401, "online"),
        (500, "auto"),
    ],
)
def test_a_run_that_cannot_begin_online_begins_offline_and_says_so_in_one_line(monkeypatch, tmp_path, fault, mode):
    with WandbServer(**({"every": fault} if isinstance(fault, int) else {})) as server, BlackHole() as black_hole:
        urls = {"closed port": "http://127.0.0.1:9", "black hole": black_hole, "no name": "http://wandb.invalid"}
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", urls.get(fault, server.environment["WANDB_BASE_URL"]))
        began = time.monotonic()
        reporter = start(tmp_path, rows=rows(12), mode=mode)
        wandb.teardown()
        assert time.monotonic() - began < 20  # and not for ever
    assert reporter.mode.startswith("offline (")
    assert len(reporter.mode.splitlines()) == 1
    assert on_disk(tmp_path) == RUN


@pytest.mark.parametrize("fault", [500, 401, 30.0])
def test_a_server_that_fails_later_costs_no_row_and_the_end_says_what_to_do(server, tmp_path, fault):
    said: list[str] = []
    reporter = begun(tmp_path, said=said)
    server.fault["file_stream"] = fault
    for each in rows(12):
        reporter.append(each)
    began = time.monotonic()
    reporter.close()
    assert time.monotonic() - began < 15
    (line,) = said
    assert f"pipeline sync {tmp_path}" in line
    assert on_disk(tmp_path) == RUN
    server.fault.clear()
    start(tmp_path, journal=rows(12))  # a finished run that is started again
    assert server.steps() == RUN


CRASH = """
import os, signal, subprocess, sys, time
from pathlib import Path
from tests.callbacks.test_wandb_reporter import begun, rows, write

def crash():
    children = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    alive = [line for line in children.stdout.splitlines() if "wandb-core" in line and "defunct" not in line]
    os.kill(int(alive[-1].split()[0]), signal.SIGTERM)  # it lingers, and takes nothing more
    time.sleep(0.3)

reporter = begun(directory := Path(sys.argv[1]))
for each in rows(12):
    write(directory / "metrics.csv", rows(each.step))  # the journal comes before W&B
    reporter.append(each)
    if f"{each.step} {each.split}" in sys.argv[2:]:
        crash()
reporter.interrupted()
reporter.close()
print("the end")
"""


def crashing(directory: Path, *at: str) -> list[str]:
    command = [sys.executable, "-c", CRASH, str(directory), *at]
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.parametrize("at", ["7 train", "12 train"])  # in the middle, and before the end
def test_a_signal_that_ends_wandbs_own_process_costs_no_row(tmp_path, at):
    assert crashing(tmp_path, at) == ["the end"]
    assert on_disk(tmp_path) == RUN


def test_a_client_that_crashes_again_leaves_the_run_alone(tmp_path):
    line, _ = crashing(tmp_path, "4 train", "9 train")
    assert line.startswith("W&B is left out from here on (")
    assert f"pipeline sync {tmp_path}" in line


def test_a_directory_that_takes_no_segment_leaves_the_run_alone(tmp_path):
    (tmp_path / "wandb").write_text("no directory")
    said: list[str] = []
    start(tmp_path, rows=rows(12), said=said)
    assert len(said) <= 1


def test_online_without_a_key_is_refused(tmp_path):
    with pytest.raises(TrackingError, match="set WANDB_API_KEY, or choose tracking"):
        begun(tmp_path, mode="online")


def test_no_key_is_sent_written_or_said(server, monkeypatch, tmp_path):
    said: list[str] = []
    reporter = start(tmp_path, rows=rows(12), said=said)
    server.fault["every"] = 401
    reporter = start(tmp_path, rows=rows(12), said=said)
    with pytest.raises(ServerError) as refusal:
        last_position_on_server(PLACE, seconds=2)
    monkeypatch.setenv("WANDB_API_KEY", KEY[:20])
    short = start(tmp_path, rows=rows(12), said=said)
    spoken = " ".join([*said, reporter.mode, short.mode, str(refusal.value)])
    assert KEY[:20] not in spoken
    assert not any(KEY.encode() in body for body in server.received)
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not any(KEY[:20].encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "127.0.0.1"])
def test_a_password_in_the_address_of_the_server_is_refused_and_not_said(monkeypatch, host):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://me:hunter2@{host}")
    wandb.teardown()
    with pytest.raises(ServerError, match=f"WANDB_BASE_URL holds a name or password for {host}; leave it out") as error:
        last_position_on_server(PLACE, seconds=2)
    assert "hunter2" not in str(error.value)


def test_the_server_is_asked_how_far_it_is(server, monkeypatch, tmp_path):
    assert last_position_on_server(PLACE, seconds=2) == -1
    start(tmp_path, rows=rows(5))
    assert last_position_on_server(PLACE, seconds=2) == 11
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ServerError, match="there is no key for http"):
        last_position_on_server(PLACE, seconds=2)


def test_the_key_goes_to_no_other_server_that_a_redirect_names(server):
    with WandbServer() as other:
        server.elsewhere, server.fault["every"] = other.environment["WANDB_BASE_URL"], 302
        with pytest.raises(ServerError, match="answers with status 302"):
            last_position_on_server(PLACE, seconds=2)
        assert other.received == []


@pytest.mark.slow
def test_a_stop_on_the_page_of_a_run_reaches_it(tmp_path, server):
    """W&B's client hears of it in an answer to its rows, which it sends every 15 s."""
    stopped = threading.Event()
    reporter = WandbReporter(PLACE, directory=tmp_path, mode="auto", config={}, stop=stopped.set)
    server.run.stopped = True
    assert stopped.wait(60)
    reporter.close()
