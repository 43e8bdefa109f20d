import json

import pytest

from pipeline.config import ConfigError, completed, compose_config, read_config
from pipeline.launch.plan import close_run, joined, note_start, open_run, read_record


def config(tmp_path, *overrides):
    return compose_config(["recipe=bn_x5", "data=digits", f"run.dir={tmp_path}", *overrides])


def test_a_new_run_freezes_a_complete_config_and_its_wandb_id(tmp_path):
    opened = open_run(config(tmp_path, "cluster.devices=2"))
    assert opened.run.id.startswith("bn_x5-digits-2")
    assert read_config(opened.directory / "config.yaml") == opened
    assert opened.trainer.threads >= 1
    record = read_record(opened.directory)
    assert len(record.wandb_id) == 8
    assert [start["world"] for start in record.starts] == [2]


def test_the_same_run_goes_on_in_the_same_wandb_run_wherever_it_happens(tmp_path):
    first = open_run(config(tmp_path, "run.id=a"))
    (first.directory / "metrics.csv").touch()
    second = open_run(config(tmp_path, "run.id=a", "cluster.devices=3", "trainer.max_epochs=50"))
    assert second.trainer.threads == first.trainer.threads  # part of what a run is
    record = read_record(second.directory)
    assert [start["world"] for start in record.starts] == [1, 3]
    assert record.wandb_id == json.loads((first.directory / "run.json").read_text())["wandb_id"]
    assert read_config(second.directory / "config.yaml").trainer.max_epochs == 50


def test_the_length_of_a_curve_is_fixed_when_the_run_begins_and_epochs_more_or_less_move_no_rate(tmp_path):
    cosine = ("run.id=a", "schedule.form=cosine")
    first = open_run(config(tmp_path, *cosine, "trainer.max_epochs=12"))
    assert first.schedule.epochs == 12
    (first.directory / "metrics.csv").touch()
    longer = open_run(config(tmp_path, *cosine, "trainer.max_epochs=50"))
    assert (longer.schedule.epochs, longer.trainer.max_epochs) == (12, 50)
    assert joined(config(tmp_path, *cosine, "trainer.max_epochs=50")).schedule.epochs == 12
    with pytest.raises(ConfigError, match=r"schedule\.epochs = 50\.0, the run has 12\.0"):
        open_run(config(tmp_path, *cosine, "schedule.epochs=50"))
    assert open_run(config(tmp_path, "run.id=b")).schedule.epochs == 0  # of an exponential there is none


def test_another_run_under_the_same_name_is_refused_and_leaves_no_trace(tmp_path):
    opened = open_run(config(tmp_path, "run.id=a"))
    (opened.directory / "metrics.csv").touch()
    before = {path: path.read_bytes() for path in opened.directory.iterdir()}
    with pytest.raises(ConfigError, match=r"run.id = a is another run: seed = 7, the run has 0; choose a new run\.id"):
        open_run(config(tmp_path, "run.id=a", "seed=7"))
    assert {path: path.read_bytes() for path in opened.directory.iterdir()} == before


def test_another_data_set_under_the_same_name_is_refused(tmp_path):
    opened = open_run(completed(config(tmp_path, "run.id=b"), data={"digest": "x"}))
    (opened.directory / "metrics.csv").touch()
    with pytest.raises(ConfigError, match=r"data\.digest = 'y', the run has 'x'"):
        open_run(completed(config(tmp_path, "run.id=b"), data={"digest": "y"}))


def test_a_run_that_never_took_a_step_may_still_become_another(tmp_path):
    first = open_run(config(tmp_path, "run.id=a", "model.name=resnet81"))
    second = open_run(config(tmp_path, "run.id=a", "model.name=resnet18"))
    assert second.directory == first.directory
    assert read_config(second.directory / "config.yaml").model.name == "resnet18"


def test_a_damaged_record_is_named(tmp_path):
    opened = open_run(config(tmp_path, "run.id=a"))
    (opened.directory / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: .* needed to go on in the same W&B run"):
        open_run(config(tmp_path, "run.id=a"))


def test_a_start_says_in_what_it_computes_otherwise_than_the_last(tmp_path):
    opened = open_run(config(tmp_path, "run.id=a"))
    assert note_start(opened.directory, torch="2.11.0", device="cpu") == []
    open_run(config(tmp_path, "run.id=a"))  # this one was killed before it noted anything
    open_run(config(tmp_path, "run.id=a"))
    assert note_start(opened.directory, torch="2.15.0", device="cpu") == ["torch 2.15.0, before 2.11.0"]
    open_run(config(tmp_path, "run.id=a"))
    assert note_start(opened.directory, torch="2.15.0", device="cpu") == []


def test_a_run_that_fails_each_time_at_the_same_step_is_not_started_again(tmp_path):
    for _ in range(3):
        opened = open_run(config(tmp_path, "run.id=a", "run.stalled_starts=3"))
    close_run(opened.directory, "failed")
    refused = r"a failed 3 times in a row after step 0 and never got further.*go on once with run\.stalled_starts=0"
    with pytest.raises(ConfigError, match=refused):
        open_run(config(tmp_path, "run.id=a", "run.stalled_starts=3"))
    assert len(read_record(opened.directory).starts) == 3
    open_run(config(tmp_path, "run.id=a", "run.stalled_starts=0"))


@pytest.mark.parametrize("ended", ["interrupted", "done"])
def test_interruptions_and_progress_are_no_crash_loop(tmp_path, ended):
    for _ in range(4):  # ended by a signal, or progress, in between
        opened = open_run(config(tmp_path, "run.id=a", "run.stalled_starts=2"))
        close_run(opened.directory, ended)
    for step in (10, 20, 30):
        (opened.directory / "checkpoints").mkdir(exist_ok=True)
        (opened.directory / "checkpoints" / f"step-{step:08d}.ckpt").touch()
        open_run(config(tmp_path, "run.id=a", "run.stalled_starts=2"))
    record = read_record(opened.directory)
    assert [start["step"] for start in record.starts] == [0, 0, 0, 0, 10, 20, 30]
    assert record.starts[0]["ended"] == ended


def test_a_node_that_does_not_lead_takes_part_whatever_it_sees_of_the_directory(tmp_path):
    here = config(tmp_path, "run.id=a", "trainer.threads=3")
    here.directory.mkdir()
    (here.directory / "logs").mkdir()  # and no config yet: what the leading node writes comes late
    assert joined(here) == here
    begun = open_run(config(tmp_path, "run.id=b", "trainer.threads=5"))
    (begun.directory / "metrics.csv").touch()
    assert joined(config(tmp_path, "run.id=b")).trainer.threads == 5  # part of what a run is
