"""A run for each combination of values, of which none is run twice and an interrupted one goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.callbacks.journal import read_journal
from pipeline.callbacks.metrics import METRICS, wandb_name
from pipeline.cli import main
from pipeline.cli.multirun import elements_of
from pipeline.config import CONF, ConfigError, combinations, compose_config
from pipeline.launch.plan import read_record
from pipeline.launch.sweep import check_names

SWEEPS = sorted((CONF / "sweeps").glob("*.yaml"))


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        elements_of(words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_combination_is_a_run_named_after_its_values(tmp_path):
    words = ["optimizer.rate=0.01,0.1", "data=digits", "norm.group_size=0,node", f"run.dir={tmp_path}"]
    found = elements_of([*words, "run.id=rates"])
    assert [each.config.run.id for each in found] == [
        "rates-rate_0.01-group_size_0", "rates-rate_0.01-group_size_node",
        "rates-rate_0.1-group_size_0", "rates-rate_0.1-group_size_node",
    ]  # fmt: skip
    assert [(each.config.optimizer.rate, each.config.norm.group_size) for each in found] == [
        (0.01, 0), (0.01, "node"), (0.1, 0), (0.1, "node"),
    ]  # fmt: skip
    assert {each.state for each in found} == {"new"}
    unnamed = elements_of(["recipe=smoke,bn_x5", "data=digits", "seed=0,1", f"run.dir={tmp_path}"])
    assert [each.config.run.id for each in unnamed] == [
        f"{recipe}-digits-seed_{seed}" for recipe in ("smoke", "bn_x5") for seed in (0, 1)
    ]
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_what_is_chosen_on_an_axis_is_a_name_already(tmp_path):
    found = elements_of(["recipe=bn_x5,bn_x30", "data=digits", "seed=0,1", "run.id=x", f"run.dir={tmp_path}"])
    assert [each.config.run.id for each in found] == ["x-bn_x5-seed_0", "x-bn_x5-seed_1", "x-bn_x30-seed_0",
                                                      "x-bn_x30-seed_1"]  # fmt: skip


def test_the_six_members_of_the_ensemble_are_one_array(tmp_path, shards, capsys):
    recipes = ",".join(f"bn_x30_member_{n}" for n in range(6))
    words = [f"recipe={recipes}", "data=folder", f"data.root={shards}", "data.image_size=24", "model.stem=small",
             "model.width=0.125", "cluster=slurm_1x8", "cluster.accelerator=cpu", f"run.dir={tmp_path / 'runs'}",
             "run.id=ensemble"]  # fmt: skip
    main(["launch", "--multirun", *words, "--dry-run"])
    shown = capsys.readouterr().out
    assert "6 runs, 6 of them to be started:" in shown
    for n in range(6):
        assert f"{tmp_path / 'runs'}/ensemble-bn_x30_member_{n} " in shown
    assert "#SBATCH --array=0-5" in shown
    assert not (tmp_path / "runs").exists()


def test_what_stands_in_brackets_or_quotes_is_one_value():
    (only,) = combinations(["data.mean=[1,2,3]", 'slurm.partition="a,b"'])
    assert only.swept == {}
    found = combinations(["tracking.tags=[a,b],[c]", "seed=range(0,3)"])
    assert [each.swept for each in found] == [
        {"tracking.tags": tags, "seed": seed} for tags in ("[a,b]", "[c]") for seed in ("0", "1", "2")
    ]


def test_keys_of_one_name_are_told_apart_in_full():
    found = elements_of(["data.cache_gb=1,2", "data.root=a,b/c", "norm.eps=0.1", "data=digits", "run.id=x"])
    assert [each.config.run.id for each in found][-1] == "x-cache_gb_2-root_b_c"
    found = elements_of(["trainer.threads=1,2", "data=digits", "cluster.workers=0,1", "slurm.minutes=1,2", "run.id=x"])
    assert found[0].config.run.id == "x-threads_1-workers_0-minutes_1"


def test_what_cannot_be_run_is_refused_before_anything_runs(tmp_path):
    assert "one value for each key" in refused("optimizer.rate=0.1", "data=digits")
    assert "optimizer.rate = -1.0 must be positive" in refused("optimizer.rate=0.1,-1", "data=digits")
    assert "a value stands there twice" in refused("seed=1,1")
    assert "seed is given twice" in refused("seed=1,2", "seed=3")
    assert "recipe = 'bn_x6' is not offered; did you mean" in refused("recipe=bn_x5,bn_x6")
    assert "names its runs by their values" in refused("run.id=a,b")
    assert "is not key=value" in refused("runs/first/config.yaml", "seed=1,2")
    assert "is that of two of them" in refused("data.root=a/b,a_b", "data=digits", "run.id=x")
    assert "at most 1,000" in refused("seed=range(0,1001)")
    assert "cannot be read" in refused("seed=1,2", "data.root=[a")


@pytest.fixture
def words(shards, tmp_path):
    return [
        "recipe=bn_x5", "data=folder", f"data.root={shards}", f"run.dir={tmp_path / 'runs'}", "run.id=m",
        "optimizer.rate=0.01,0.02", "data.image_size=16", "model.stem=small", "model.width=0.125",
        "data.global_batch_size=24", "trainer.max_epochs=99", "trainer.threads=1", "tracking.every_steps=1",
        "trainer.validate_every_epochs=0", "tracking.mode=disabled", "norm.precise_images=0",
        "cluster.accelerator=cpu",
    ]  # fmt: skip


def launched(words: list[str], *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", "launch", "--multirun", *words, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd(),
                            env={**os.environ, "PYTHONPATH": str(CONF.parent)})  # fmt: skip


def test_done_runs_are_left_out_and_an_interrupted_one_goes_on(words, tmp_path):
    first, second = (tmp_path / "runs" / f"m-rate_{rate}" for rate in ("0.01", "0.02"))
    process = launched(words, "trainer.max_steps=40")
    until = time.monotonic() + 120
    while not ((second / "metrics.csv").exists() and read_journal(second / "metrics.csv")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.splitlines()[-1] == "pipeline: interrupted; the same command goes on from there"
    assert read_record(first).starts[-1]["ended"] == "done"
    assert read_record(second).starts[-1]["ended"] == "interrupted"

    process = launched(words, "trainer.max_steps=40")
    shown, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    lines = shown.splitlines()
    assert lines[0] == "2 runs, 1 of them to be started:"
    assert "done" in lines[1]
    assert "goes on from step" in lines[2]
    assert lines[-1] == f"compare them with: pipeline report {first} {second} --output {tmp_path / 'runs/comparison'}"
    assert [len(read_record(run).starts) for run in (first, second)] == [1, 2]
    for run in (first, second):
        assert [row.step for row in read_journal(run / "metrics.csv") if row.split == "train"] == [*range(1, 41)]
    found = elements_of([*words, "trainer.max_steps=41"])  # more steps than they were done with
    assert [each.state for each in found] == ["goes on from step 40"] * 2


def test_a_run_that_fails_keeps_no_other_from_running_and_gives_its_code(words, tmp_path, monkeypatch):
    ended = iter([3, 0])
    monkeypatch.setattr("pipeline.cli.multirun._train", lambda words: next(ended))
    assert main(["launch", "--multirun", *words]) == 3
    assert next(ended, None) is None


def test_a_dry_run_lists_and_starts_nothing(words, tmp_path, capsys):
    assert main(["launch", "--multirun", "--dry-run", *words]) == 0
    assert "2 runs, 2 of them to be started:" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert main(["launch", "--multirun", "--array", "0-3", *words]) == 2
    assert "leave out --array" in capsys.readouterr().err
    assert main(["launch", "--multirun", "cluster=docker", *words]) == 2
    assert "cluster.launcher = docker: --multirun" in capsys.readouterr().err
    assert main(["launch", "--multirun", "cluster=local,slurm_1x8", *words]) == 2
    assert "cluster.launcher = local and slurm: --multirun starts all" in capsys.readouterr().err


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_of_wandb_names_keys_and_metrics_that_are_there_and_a_command_that_composes(path):
    sweep = yaml.safe_load(path.read_text())
    check_names(list(sweep["parameters"]))
    assert sweep["metric"]["name"] in {wandb_name(metric, "val") for metric in METRICS}
    assert sweep["command"][:3] == ["${env}", "pipeline", "train"]
    *given, last = sweep["command"][3:]
    assert last == "${args_no_hyphens}"
    for end in (0, -1):
        drawn = [
            f"{key}={parameter['values'][end] if 'values' in parameter else parameter['min' if end else 'max']}"
            for key, parameter in sweep["parameters"].items()
        ]
        compose_config([*given, *drawn])


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_command_without_wandb_on_the_page_of_a_sweep_makes_runs(path, tmp_path):
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(lines).partition("--multirun ")[2].replace("\\ ", "")
    words = text.split()
    assert len(elements_of([*words, f"run.dir={tmp_path}"])) >= 3
