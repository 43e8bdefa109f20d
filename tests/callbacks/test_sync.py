import itertools
import json
import re
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.callbacks.segments import segments
from pipeline.callbacks.sync import SyncError, synchronize
from pipeline.cli.settling import settled
from pipeline.config import compose_config
from pipeline.launch.lock import locked
from pipeline.launch.plan import open_run
from tests.callbacks.test_wandb_reporter import PLACE, RUN, BlackHole, client, row, rows, server, start, write
from tests.callbacks.wandb_server import KEY

__all__ = ["client", "server"]


def journal(directory: Path, upto: int) -> None:
    write(directory / "metrics.csv", rows(upto))


def three_segments(directory: Path) -> None:
    for above, upto in itertools.pairwise((0, 4, 9, 12)):
        start(directory, journal=rows(above), rows=rows(upto, above=above), mode="offline")
    journal(directory, 12)


def synced(directory: Path, seconds: float = 60) -> tuple[int, list[str]]:
    said: list[str] = []
    return synchronize(directory, PLACE, seconds=seconds, say=said.append), said


def test_all_segments_are_sent_in_order_and_once(server, tmp_path):
    three_segments(tmp_path)
    count, said = synced(tmp_path)
    assert (count, server.steps()) == (len(RUN), RUN)
    assert [line.partition(":")[0] for line in said] == [each.name for each in segments(tmp_path, PLACE.id)]
    server.calls.clear()
    count, said = synced(tmp_path)
    assert count == 0
    assert said == [f"{tmp_path}: nothing to send, 3 segments were sent before"]
    assert not server.calls
    assert server.steps() == RUN


def test_later_segments_follow_earlier_ones(server, tmp_path):
    for above, upto in itertools.pairwise((0, 5, 12)):
        start(tmp_path, journal=rows(above), rows=rows(upto, above=above), mode="offline")
        assert synced(tmp_path)[0] == len(rows(upto, above=above))
    assert server.steps() == RUN


def test_rows_that_a_kill_lost_come_from_the_journal(server, tmp_path):
    three_segments(tmp_path)
    last = segments(tmp_path, PLACE.id)[-1].path
    last.write_bytes(last.read_bytes()[:-700])
    count, said = synced(tmp_path)
    assert count == len(RUN)
    assert "metrics.csv" in said[-1]
    assert server.steps() == RUN


@pytest.mark.parametrize("streams", [1, 3])
def test_a_sync_that_was_cut_off_goes_on_without_repeats(server, tmp_path, streams):
    three_segments(tmp_path)
    taken = server.file_stream

    def cut(body):
        answer = taken(body)
        if server.calls["file_stream"] >= streams:
            server.fault["file_stream"] = 500
        return answer

    server.file_stream = cut
    with pytest.raises(SyncError, match="the same command goes on from there"):
        synced(tmp_path, seconds=5)
    server.file_stream = taken
    server.fault.clear()
    synced(tmp_path)
    assert server.steps() == RUN


def test_of_a_segment_sent_in_part_only_the_rest_is_sent(server, tmp_path):
    start(tmp_path, rows=rows(6), mode="offline")
    start(tmp_path / "elsewhere", rows=rows(3))
    journal(tmp_path, 6)
    count, _ = synced(tmp_path)
    assert count == len(rows(6, above=3))
    assert server.steps() == RUN[: len(rows(6))]


def test_rows_that_the_server_refused_while_online_are_sent_before_later_segments(server, tmp_path):
    start(tmp_path, rows=rows(3))
    server.fault["file_stream"] = 401
    start(tmp_path, journal=rows(3), rows=rows(7, above=3))
    server.fault["every"] = 401
    start(tmp_path, journal=rows(7), rows=rows(12, above=7))
    server.fault.clear()
    journal(tmp_path, 12)
    assert sum(each.is_offline for each in segments(tmp_path, PLACE.id)) == 1
    synced(tmp_path)
    assert server.steps() == RUN
    assert synced(tmp_path)[1] == [f"{tmp_path}: nothing to send, W&B has every row"]


def test_a_refusal_that_wandb_sync_takes_for_success_is_none(server, tmp_path):
    three_segments(tmp_path)
    server.fault["file_stream"] = 401
    with pytest.raises(SyncError, match="Fatal error while uploading data"):
        synced(tmp_path)
    assert not any(each.marker.exists() for each in segments(tmp_path, PLACE.id))
    server.fault.clear()
    synced(tmp_path)
    assert server.steps() == RUN


@pytest.fixture
def run(shards, tmp_path) -> Path:
    """A run's directory with one offline segment."""
    words = ["data=folder", f"data.root={shards}", "data.global_batch_size=24", f"run.dir={tmp_path}", "run.id=a"]
    directory = open_run(settled(compose_config(words))).directory
    record = directory / "run.json"
    record.write_text(re.sub(r'"wandb_id": "\w+"', f'"wandb_id": "{PLACE.id}"', record.read_text()))
    start(directory, rows=[row(1, "train")], mode="offline")
    return directory


def test_the_verb_sends_a_run(capsys, server, run):
    assert cli.main(["sync", str(run)]) == 0
    assert "1 rows, to step 1" in capsys.readouterr().out
    assert server.steps() == [(1, "train")]
    assert cli.main(["sync", str(run)]) == 0
    assert "nothing to send, 1 segments were sent before" in capsys.readouterr().out


def test_a_run_that_is_not_to_be_tracked_or_has_not_begun_is_not_sent(capsys, server, run):
    config = run / "config.yaml"
    tracked = config.read_text()
    config.write_text(tracked.replace("mode: auto", "mode: disabled"))
    assert cli.main(["sync", str(run)]) == 0
    assert "tracking.mode = disabled" in capsys.readouterr().out
    config.write_text(tracked)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"starts": []}))
    assert cli.main(["sync", str(run)]) == 0
    assert "it has not begun" in capsys.readouterr().out
    assert server.runs == {}


def test_of_several_runs_one_that_fails_holds_up_no_other(capsys, server, run, tmp_path):
    assert cli.main(["sync", str(tmp_path), str(run), "--timeout", "60"]) == 2
    said = capsys.readouterr()
    assert "is no run" in said.err
    assert server.steps() == [(1, "train")]
    assert cli.main(["sync", "tracking.mode=offline"]) == 2
    assert "there is no run to send" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no key", "there is no key for http"), ("closed port", "does not answer"), ("black hole", "does not answer"),
        (401, "answers with status 401; is the key right"), (500, "answers with status 500"),
        ("slow", "W&B did not take offline-run-"),
    ],
)  # fmt: skip
def test_what_stops_a_sync_is_said_in_one_line(capsys, monkeypatch, server, run, fault, says):
    with BlackHole() as black_hole:
        match fault:
            case "no key":
                monkeypatch.delenv("WANDB_API_KEY")
            case "closed port":
                monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
            case "black hole":
                monkeypatch.setenv("WANDB_BASE_URL", black_hole)
            case "slow":
                server.fault["file_stream"] = 30.0
            case status:
                server.fault["every"] = status
        began = time.monotonic()
        assert cli.main(["sync", str(run), "--timeout", "4"]) == 1
        assert time.monotonic() - began < 15
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pipeline: {run}: ")
    assert says in line
    assert KEY not in line
    assert not segments(run, PLACE.id)[0].marker.exists()


def test_a_run_that_goes_on_is_left_alone(capsys, monkeypatch, run):
    with locked(run):
        assert cli.main(["sync", str(run)]) == 1
    assert "belongs to a run that is going on" in capsys.readouterr().err


def test_what_is_no_run_is_refused(capsys, tmp_path):
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ending:
        cli.main(["sync", str(tmp_path), "--timeout", "0"])
    assert ending.value.code == 2
