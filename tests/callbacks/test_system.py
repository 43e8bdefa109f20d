"""What nodes do is on file, whatever happened to a start; and W&B gets it beside the rows, once."""

import threading
import time
from types import SimpleNamespace

import pytest

from pipeline.callbacks import samples, system
from pipeline.callbacks.samples import Nodes, Table, whole_lines
from pipeline.callbacks.system import System

NAMES = ("cpu", "load")
HEADER = "at,host,cpu,load\n"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(system, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(samples.socket, "gethostname", lambda: "a")


def write(directory, node: int, *lines: str) -> None:
    path = directory / "system" / f"node-{node}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines([*([] if file.tell() else [HEADER]), *lines])


def until(true, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_node_is_sampled_beside_the_training_and_a_later_start_goes_on(tmp_path):
    path, trainer = tmp_path / "system" / "node-3.csv", SimpleNamespace(global_step=0)
    for start in (1, 2):
        each = System(tmp_path, node=3, every_seconds=0.03)
        each.on_train_start(trainer, None)
        until(lambda start=start: len(whole_lines(path)) >= 4 * start)
        each.on_exception(trainer, None, KeyboardInterrupt())
        assert not any(thread.name == "system" for thread in threading.enumerate())
    lines = whole_lines(path)
    times = [float(line["at"]) for line in lines]
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 60
    assert all(line["host"] == "a" and 0 <= float(line["cpu"] or 0) <= 1 for line in lines)
    assert path.read_text().count("at,host") == 1


def test_a_line_that_a_kill_cut_short_is_left_out_and_cut_off(tmp_path):
    write(tmp_path, 0, "100.0,a,0.5,1\n", "115.0,a,0.")
    path = tmp_path / "system" / "node-0.csv"
    assert [line["at"] for line in whole_lines(path)] == ["100.0"]
    assert Nodes(path.parent).news() == {"system/cpu/node-0": 0.5, "system/load/node-0": 1.0}
    Table(path, NAMES).append({"cpu": 0.75})
    header, first, second = path.read_text().splitlines(keepends=True)
    assert (header, first) == (HEADER, "100.0,a,0.5,1\n")
    assert second.endswith(",a,0.75,\n")


def test_a_machine_with_other_gpus_goes_on_in_the_same_file(tmp_path):
    write(tmp_path, 0, "100.0,a,0.5,1\n")
    path = tmp_path / "system" / "node-0.csv"
    Table(path, ("cpu", "gpu0_use")).append({"cpu": 0.75, "gpu0_use": 0.9})
    first, second = whole_lines(path)
    assert first == {"at": "100.0", "host": "a", "cpu": "0.5", "gpu0_use": "", "load": "1"}
    assert (second["cpu"], second["gpu0_use"]) == ("0.75", "0.9")


def test_what_a_gpu_did_stays_when_it_is_there_no_more(tmp_path):
    path = tmp_path / "node-0.csv"
    path.write_text("at,host,cpu,gpu0_use\n1.0,a,0.5,0.9\n")
    Table(path, ("cpu",)).append({"cpu": 0.75})
    assert [(line["cpu"], line["gpu0_use"]) for line in whole_lines(path)] == [("0.5", "0.9"), ("0.75", "")]


def test_a_quote_is_a_damaged_value_and_not_the_end_of_all_that_follows(tmp_path):
    path = tmp_path / "node-0.csv"
    path.write_text('at,host,cpu\n1.0,"a,0.5\n' + "2.0,a,0.5\n" * 20_000)
    Table(path, ("cpu",))
    assert len(whole_lines(path)) == 20_001


def test_a_file_that_cannot_be_read_now_is_not_begun_anew(tmp_path, monkeypatch):
    path = tmp_path / "node-0.csv"
    path.write_text("at,host,cpu\n1.0,a,0.5\n")

    def stale(*_: object, **__: object) -> str:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(type(path), "read_text", stale)
        with pytest.raises(OSError, match="Stale"):
            Table(path, ("cpu",))
    assert len(whole_lines(path)) == 1


def test_the_newest_sample_of_each_node_is_news_once(tmp_path):
    write(tmp_path, 0, "100.0,a,0.1,1\n", "115.0,a,0.2,1\n")
    nodes = Nodes(tmp_path / "system")
    assert nodes.news() == {"system/cpu/node-0": 0.2, "system/load/node-0": 1.0}
    assert nodes.news() == {}
    write(tmp_path, 1, *(f"{at},b,0.9,\n" for at in range(1000)))  # that begins later, and whose clock is another
    assert nodes.news() == {"system/cpu/node-1": 0.9}
    write(tmp_path, 0, "130.0,a,0.3,2\n")
    write(tmp_path, 1, "9")  # being written
    assert nodes.news() == {"system/cpu/node-0": 0.3, "system/load/node-0": 2.0}


def test_a_row_gets_what_all_nodes_did_since_the_one_before_and_nothing_of_an_earlier_start(tmp_path):
    told, trainer = [], SimpleNamespace(global_step=7)
    write(tmp_path, 1, "100.0,b,0.5,1\n")
    each = System(tmp_path, node=0, every_seconds=0.02, every_steps=5, tell=told.append)
    each.on_train_start(trainer, None)
    path = tmp_path / "system" / "node-0.csv"
    until(lambda: len(whole_lines(path)) >= 2)
    write(tmp_path, 1, "115.0,b,0.6,1\n")
    lines = len(whole_lines(path))
    until(lambda: len(whole_lines(path)) >= lines + 2)
    for trainer.global_step in (8, 9):
        each.on_train_batch_end(trainer, None, None, None, 0)
    assert told == []
    trainer.global_step = 10
    for _ in range(3):  # micro-batches behind the step
        each.on_train_batch_end(trainer, None, None, None, 0)
    (figures,) = told
    assert figures["system/cpu/node-1"] == 0.6
    assert "system/load/node-0" in figures
    each.on_train_end(trainer, None)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"something,else\n1,2\n", b"at,host\nx,y,z\n" * 9])
def test_a_damaged_file_is_no_error_and_is_begun_anew(tmp_path, content):
    path = tmp_path / "system" / "node-0.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    (path.parent / "node-x.csv").write_text("")
    assert Nodes(path.parent).news() == {}
    Table(path, NAMES).append({"cpu": 0.5})
    assert [line["cpu"] for line in whole_lines(path)] == ["0.5"]
    assert Nodes(path.parent).news() == {"system/cpu/node-0": 0.5}


def test_a_directory_that_cannot_be_written_costs_samples_alone(tmp_path):
    (tmp_path / "system").write_text("in the way")
    each = System(tmp_path, node=0, every_seconds=0.02, tell=lambda figures: None)
    each.on_train_start(SimpleNamespace(global_step=0), None)
    time.sleep(0.2)
    assert each._thread.is_alive()
    each.on_train_end(None, None)
    assert each._thread is None
