"""A run of a W&B sweep: its parameters are drawn once, checked, frozen, and found again by every later start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from pipeline import cli
from pipeline.callbacks import sweep
from pipeline.callbacks.sweep import Sweep, SweepError
from pipeline.cli import sweep as verb
from pipeline.config import ConfigError, read_config
from pipeline.launch.plan import read_record
from pipeline.launch.sweep import by_agent, check_names
from tests.callbacks.wandb_server import KEY, WandbServer
from tests.launch.test_slurm import launch, refused, run_script, slurm, small, words  # noqa: F401

ROOT = Path(__file__).parents[2]
RATES = ({"optimizer.rate": 0.01}, {"optimizer.rate": 1e-05}, {"optimizer.rate": 0.5, "model.activation": "sigmoid"})


@pytest.fixture
def server(slurm, monkeypatch):  # noqa: F811
    wandb.teardown()
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setattr(sweep, "ASK_EVERY", 0.05)
        yield server
    wandb.teardown()


def draw(run: Path) -> int:
    return cli.main(["launch", "--draw", str(run)])


def test_each_element_draws_its_own_parameters_once_and_is_that_run_of_the_sweep(server, slurm, shards, capsys):  # noqa: F811
    given = server.sweep(*RATES).given
    assert launch(shards, "--sweep", "someone/pipeline/swept", "--array", "0-3%2") == 0
    runs = [slurm / "runs" / f"a-{number}" for number in range(4)]
    assert [read_config(run / "config.yaml").seed for run in runs] == [0] * 4
    assert given == {}  # nothing is drawn before a job starts
    assert [draw(run) for run in runs] == [0, 0, 0, 4]
    assert "sweep someone/pipeline/swept has no more parameters" in capsys.readouterr().out
    assert list(given.values()) == list(RATES)
    for run, (name, parameters) in zip(runs, given.items(), strict=False):
        config = read_config(run / "config.yaml")
        assert config.optimizer.rate == parameters["optimizer.rate"]
        assert config.model.activation == parameters.get("model.activation", "relu")
        assert (config.data.num_classes, config.trainer.threads, config.tracking.entity) == (5, 12, "someone")
        assert read_record(run).wandb_id == name
    calls = server.calls["CreateAgent"]
    before = (runs[0] / "config.yaml").read_bytes()
    assert [draw(run) for run in runs[:3]] == [0, 0, 0]
    assert (runs[0] / "config.yaml").read_bytes() == before
    assert server.calls["CreateAgent"] == calls


def test_a_start_that_was_killed_behind_its_draw_does_not_draw_again(server, slurm, shards, monkeypatch):  # noqa: F811
    given = server.sweep(*RATES).given
    assert launch(shards, "--sweep", "pipeline/swept") == 0
    run = slurm / "runs" / "a"

    def killed(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.launch.sweep.freeze_drawn", killed)
        assert draw(run) == 1
    assert read_config(run / "config.yaml").optimizer.rate != 0.01
    assert draw(run) == 0
    assert read_config(run / "config.yaml").optimizer.rate == 0.01
    assert list(given) == ["drawn0"]


def test_the_same_command_goes_on_with_what_was_drawn(server, slurm, shards, capsys):  # noqa: F811
    server.sweep(*RATES)
    words_ = ("--sweep", "pipeline/swept", "--array", "0-1")
    assert launch(shards, *words_) == 0
    run = slurm / "runs" / "a-1"
    assert draw(run) == 0
    (run / "metrics.csv").touch()
    assert launch(shards, *words_) == 0
    assert read_config(run / "config.yaml").optimizer.rate == 0.01
    assert read_record(run).wandb_id == "drawn0"
    assert draw(run) == 0
    assert len(server.sweeps["swept"].given) == 1
    assert cli.main(["launch", str(run / "config.yaml")]) == 0
    assert '--draw "$run"' in (run / "job.sbatch").read_text()
    capsys.readouterr()
    assert launch(shards, "--array", "0-1") == 2
    assert (
        "run.id = a-0 belongs to sweep swept; choose a new run.id, or launch it with --sweep" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("parameters", "said"), [
    ({"optimizer.rate": -1}, "the sweep's parameters: optimizer.rate = -1.0 must be positive"),
    ({"optimizer.rate": "fast"}, "the sweep's parameters: optimizer.rate = 'fast' has the wrong type; it must be a"),
    ({"data.global_batch_size": 131}, "data.global_batch_size = 131 exceeds the 130 training images; lower it in the"),
])  # fmt: skip
def test_a_bad_value_ends_its_element_and_w_and_b_knows(server, slurm, shards, capsys, parameters, said):  # noqa: F811
    server.sweep(parameters)
    assert launch(shards, "--sweep", "pipeline/swept") == 0
    capsys.readouterr()
    assert draw(slurm / "runs" / "a") == 2
    assert said in capsys.readouterr().err
    assert (server.run.name, server.run.sweep, server.run.exit_code) == ("drawn0", "swept", 2)
    assert draw(slurm / "runs" / "a") == 2  # and does not take parameters that another could have
    assert server.calls["CreateAgent"] == 1


def test_what_a_sweep_cannot_do_is_refused_before_the_submission(server, slurm, shards, capsys, monkeypatch):  # noqa: F811
    here = ["data=folder", f"data.root={shards}", "data.global_batch_size=24", "cluster=slurm_1x8", "--sweep"]
    line = refused(capsys, 2, *here, "someone/pipeline/nowhere")
    assert "W&B knows no sweep someone/pipeline/nowhere; make one with `wandb sweep FILE.yaml`" in line
    assert "'a//b' is no sweep; write ENTITY/PROJECT/SWEEP" in refused(capsys, 2, *here, "a//b")
    server.sweep({"optimizer.ratio": 1})
    assert "the sweep's parameter optimizer.ratio is not a key" in refused(capsys, 2, *here, "swept")
    server.sweep({"cluster.nodes": 2})
    assert "parameter cluster.nodes is settled before it is asked; give it to the launch" in refused(
        capsys, 2, *here, "swept"
    )
    server.sweep(*RATES).state = "FINISHED"
    assert "sweep pipeline/swept is finished; make another" in refused(capsys, 2, *here, "swept")
    assert "tracking.mode = offline; choose auto or online" in refused(
        capsys, 2, *here, "swept", "tracking.mode=offline"
    )
    server.fault["Sweep"] = 500
    assert "answers with status 500; try again later, or leave --sweep out" in refused(capsys, 2, *here, "swept")
    monkeypatch.delenv("WANDB_API_KEY")
    line = refused(capsys, 2, *here, "swept")
    assert (
        "there is no key; set WANDB_API_KEY, or run `wandb login`, or leave --sweep out: --array 0-7 makes runs" in line
    )
    assert not (slurm / "runs").exists()
    assert launch(shards) == 0
    capsys.readouterr()
    assert "runs/a is no run of a sweep; submit one with" in refused(capsys, 2, "--draw", "runs/a")


def test_a_paused_sweep_is_waited_for_and_then_said(server, slurm, shards, capsys, monkeypatch):  # noqa: F811
    server.sweep(*RATES)
    assert launch(shards, "--sweep", "pipeline/swept") == 0
    server.sweeps["swept"].state = "PAUSED"
    monkeypatch.setattr(verb, "PATIENCE", 0.2)
    assert draw(slurm / "runs" / "a") == 1
    said = capsys.readouterr()
    assert "has no parameters yet" in said.out
    assert "has given no parameters for 0 s; if it is paused, resume it with `wandb sweep --resume" in said.err
    server.fault["every"] = 500
    assert draw(slurm / "runs" / "a") == 75  # the job starts itself again
    server.fault.clear()
    with monkeypatch.context() as patch:
        patch.setattr(server, "Heartbeat", lambda variables: {"data": {"agentHeartbeat": None}})
        assert draw(slurm / "runs" / "a") == 75
    assert "does not answer an agent as a W&B server does" in capsys.readouterr().err
    server.sweeps["swept"].state = "RUNNING"
    assert draw(slurm / "runs" / "a") == 0


def test_a_node_that_sees_no_key_ends_its_element_and_does_not_start_again(server, slurm, shards, capsys, monkeypatch):  # noqa: F811
    server.sweep(*RATES)
    assert launch(shards, "--sweep", "pipeline/swept") == 0
    monkeypatch.delenv("WANDB_API_KEY")  # that of ~/.netrc, which a container does not see
    assert draw(slurm / "runs" / "a") == 2
    assert "no key of W&B is seen on" in capsys.readouterr().err


def test_a_job_whose_sweep_is_over_starts_nothing_and_one_that_cannot_ask_starts_again(slurm):  # noqa: F811
    job = small(slurm, draws=True, restarts=3)
    code, said = run_script(job, ENDS="4")
    assert (code, "the sweep is over: nothing was started" in said) == (0, True)
    assert (slurm / "calls").read_text().count("srun") == 1
    assert words(slurm)[-3:] == ["launch", "--draw", str(job.run)]
    code, said = run_script(job, ENDS="75")
    assert (code, "it starts itself again, 1 of at most 3 times" in said) == (0, True)
    code, said = run_script(job, ENDS="2")
    assert (code, "ended with code 2: another start would end there again" in said) == (2, True)
    (slurm / "calls").unlink()
    assert run_script(job)[0] == 0
    assert (slurm / "calls").read_text().count("srun") == 3  # the draw, the check, the run
    assert words(slurm)[-2:] == ["train", f"{job.run}/config.yaml"]


def test_a_sweep_is_named_as_its_agent_takes_it():
    assert Sweep.of("e/p/s") == Sweep("e", "p", "s")
    assert Sweep.of("p/s") == Sweep(None, "p", "s")
    assert (Sweep.of("s", "mine"), str(Sweep.of("s", "mine"))) == (Sweep(None, "mine", "s"), "mine/s")
    for text in ("", "/s", "a/b/c/d"):
        with pytest.raises(SweepError, match="is no sweep"):
            Sweep.of(text)
    check_names(["optimizer.rate", "seed"])
    with pytest.raises(ConfigError, match="recipe is not a key"):
        check_names(["recipe"])


def test_a_run_that_its_sweep_stops_saves_and_ends_as_done(server, slurm, shards, capsys, monkeypatch):  # noqa: F811
    """As hyperband does it: the agent's sign of life is answered with a stop."""
    server.sweep({"optimizer.rate": 0.01}, {"optimizer.rate": 0.02})
    small_run = ("data.image_size=16", "model.stem=small", "model.width=0.125", "cluster.accelerator=cpu",
                 "trainer.threads=1", "norm.precise_images=24", "trainer.max_epochs=500")  # fmt: skip
    assert launch(shards, "--sweep", "someone/pipeline/swept", *small_run) == 0
    run = slurm / "runs" / "a"
    assert draw(run) == 0
    monkeypatch.setattr(sweep, "BEAT_EVERY", 0.5)
    here = ["cluster.launcher=local", "cluster.nodes=1", "cluster.devices=1"]
    server.stop.add("drawn0")
    assert cli.main(["train", str(run / "config.yaml"), *here]) == 0
    said = capsys.readouterr().err
    assert "pipeline: stopped by W&B: interrupted " in said  # after a step, or in a validation: when the beat falls
    assert list((run / "checkpoints").glob("step-*.ckpt"))
    stored = server.run
    assert (stored.name, stored.sweep, stored.exit_code, stored.preempting) == ("drawn0", "swept", 0, False)
    assert len(server.sweeps["swept"].given) == 1  # a sign of life asks for no other run
    server.stop.clear()
    steps = len(stored.history)
    more = [f"trainer.max_steps={(steps + 30) // 5 * 5}", *here]
    assert cli.main(["train", str(run / "config.yaml"), *more]) == 0  # whoever starts it again wants it to go on
    assert "stopped by W&B" not in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_agent_starts_runs_of_its_sweep_on_this_machine(server, slurm, shards, tmp_path):  # noqa: F811
    """The real agent, its sweep's command being `pipeline train` with the parameters as overrides."""
    server.sweep({"optimizer.rate": 0.01, "trainer.max_steps": 2}, {"optimizer.rate": 1e-05, "trainer.max_steps": 2})
    server.command = [sys.executable, "-m", "pipeline", "train", "recipe=smoke", "data=folder", f"data.root={shards}",
                      "data.global_batch_size=24", "data.image_size=16", "trainer.threads=1",
                      "norm.precise_images=24", "${args_no_hyphens}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "online"}
    agent = Path(sys.executable).with_name("wandb")
    done = subprocess.run([agent, "agent", "someone/pipeline/swept"], capture_output=True, text=True, timeout=250,
                          cwd=tmp_path, env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(server.runs) == {"drawn0", "drawn1"}, done.stdout + done.stderr
    for name, rate in (("drawn0", 0.01), ("drawn1", 1e-05)):
        run = tmp_path / "runs" / f"swept-{name}"
        assert read_config(run / "config.yaml").optimizer.rate == rate
        assert read_record(run).wandb_id == name
        stored = server.runs[name]
        assert (stored.sweep, stored.exit_code, stored.project) == ("swept", 0, "pipeline")
        assert stored.history[-1]["step"] == 2
    assert KEY not in json.dumps([path.read_text() for path in (tmp_path / "runs").rglob("*.json")])


def test_a_run_that_an_agent_goes_on_with_finds_its_directory_again():
    from pipeline.config import compose_config

    config = compose_config(["data=digits"])
    place = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_PROJECT": "p", "WANDB_ENTITY": "e"}
    made = by_agent(config, place)
    assert (made.run.id, made.tracking.project, made.tracking.entity) == ("s-r", "p", "e")
    assert by_agent(compose_config(["data=digits", "run.id=mine"]), place).run.id == "mine"
    assert by_agent(config, {"WANDB_RUN_ID": "r"}) == config
