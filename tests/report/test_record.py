import json
import os
import time

import numpy as np
import pytest

from pipeline.report.record import NotARunError, read_run
from tests.report.runs import make_run, simple, start, train, val


def test_what_a_run_left_is_read(tmp_path):
    run = read_run(simple(tmp_path / "a"))
    assert (run.name, run.state, run.steps, run.notes) == ("a", "done", 40, [])
    assert run.train["step"].tolist() == [10, 20, 30, 40]
    assert run.val["top1"].tolist() == [0.45, 0.9, 0.9, 0.9]
    assert np.isnan(run.train["mfu"]).all()
    assert run.config["data.global_batch_size"] == 4
    assert read_run(tmp_path / "a" / "config.yaml").name == "a"


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = simple(tmp_path / "a") / "metrics.csv"
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1])):
        path.write_text(whole[:-cut])
        assert read_run(tmp_path / "a").val["step"].tolist() == [10, 20, 30]


@pytest.mark.parametrize("fault", ["absent", "empty", "cut", "no list", "another form"])
def test_a_run_without_a_sound_record_of_starts_is_read_and_says_so(tmp_path, fault):
    path = simple(tmp_path / "a") / "run.json"
    text = path.read_text()
    path.unlink()
    if fault != "absent":
        path.write_text({"empty": "", "cut": text[:-20], "no list": '{"starts": 3}', "another form": "[]"}[fault])
    run = read_run(tmp_path / "a")
    assert run.starts == []
    assert any("run.json" in note for note in run.notes)
    assert run.steps == 40


def test_a_run_that_has_not_begun_is_read(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    assert (run.steps, run.state) == (0, "not begun")
    assert run.notes == ["metrics.csv has no row yet"]


@pytest.mark.parametrize(("seconds_ago", "state"), [(1, "running"), (3600, "killed")])
def test_a_start_without_an_end_runs_while_its_lock_is_touched(tmp_path, seconds_ago, state):
    directory = make_run(tmp_path / "a", [train(10, 10, seconds=5)], [start(0, ended=None)])
    assert read_run(directory).state == "killed"
    lock = directory / ".lock"
    lock.write_text("{}")
    os.utime(lock, (time.time() - seconds_ago,) * 2)
    assert read_run(directory).state == state


def test_a_start_that_was_followed_by_another_no_longer_runs(tmp_path):
    directory = make_run(tmp_path / "a", [], [start(0, ended=None), start(50, 3, ended=None)])
    (directory / ".lock").write_text("{}")
    assert [each.ended for each in read_run(directory).starts] == ["killed", "running"]


@pytest.mark.parametrize("content", [None, "", "just a word", "a: [1", "\x00"])
def test_what_is_no_run_is_refused_in_a_line(tmp_path, content):
    path = tmp_path / "a"
    path.mkdir()
    if content is not None:
        (path / "config.yaml").write_text(content)
    with pytest.raises(NotARunError, match="give a directory like runs/NAME") as refusal:
        read_run(path)
    assert "\n" not in str(refusal.value)


def test_nothing_of_a_config_is_executed(tmp_path):
    directory = make_run(tmp_path / "a")
    (directory / "config.yaml").write_text("seed: !!python/object/apply:os.mkdir [/tmp/never]\n")
    with pytest.raises(NotARunError):
        read_run(directory)


def test_norms_are_tables_of_looks_and_layers_whatever_is_missing(tmp_path):
    directory = make_run(tmp_path / "a")
    header = "step,layer,spread,dead,mean_drift,variance_drift\n"
    (directory / "norms.csv").write_text(
        header + "100,stem.norm,nan,0,0.5,0.25\n100,last.norm,nan,0.125,1,2\n200,last.norm,nan,0,3,4\n200,stem.norm,n"
    )
    norms = read_run(directory).norms
    assert norms.steps.tolist() == [100, 200]
    assert norms.layers == ["stem.norm", "last.norm"]
    np.testing.assert_array_equal(norms.values["mean_drift"], [[0.5, 1], [np.nan, 3]])
    (directory / "norms.csv").write_text(header)
    assert read_run(directory).norms is None


def test_a_journal_of_an_older_version_is_read(tmp_path):
    directory = make_run(tmp_path / "a", starts=[start(0, until=100)])
    (directory / "metrics.csv").write_text(
        "step,epoch,split,loss,top1,top5,images,rate,images_per_s,data_wait,seconds\n"
        "10,1.0,train,2.0,0.25,0.5,320,0.1,99.5,0.02,3.5\n10,1.0,val,1.5,0.5,1.0,50,,,,4.0\n"
    )
    run = read_run(directory)
    assert run.train["images_per_s"].tolist() == [99.5]
    assert np.isnan(run.train["at"]).all()
    assert json.loads((directory / "run.json").read_text())["starts"]
    assert val(1, 0.5, 1).split == "val"
