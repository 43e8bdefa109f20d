import json

import pytest

from pipeline.config import ConfigError, completed, compose_config, read_config
from pipeline.launch.plan import open_run, read_record


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
