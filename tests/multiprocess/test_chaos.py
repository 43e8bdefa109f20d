"""Killed at random moments and started again, a run is the same run; and the harness would see if it were not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import cli
from pipeline.benchmarks.chaos import chaos, differences
from pipeline.training.checkpoint import checkpoints
from pipeline.training.checkpoint_io import write_checkpoint
from tests.multiprocess.test_resume import config


@pytest.fixture
def frozen(shards: Path, tmp_path: Path) -> Path:
    return config(shards, tmp_path, "frozen", 1, "trainer.checkpoint_every_steps=2").directory


@pytest.mark.slow
def test_five_kills_leave_the_same_runs(frozen, tmp_path):
    report = chaos(frozen, tmp_path / "work", worlds=[1, 2], kills=5, seed=3, variants=[(), ("norm.group_size=1",)])
    assert report.differences == []
    assert len(report.kills) == 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills_leave_the_same_runs(frozen, tmp_path):
    variants = [(), ("norm.group_size=1",), ("model.name=inception", "model.dropout=0.4")]
    report = chaos(frozen, tmp_path / "work", worlds=[1, 2, 3], kills=200, seed=0, variants=variants)
    assert report.differences == []


def test_the_harness_sees_what_it_is_there_to_see(frozen, tmp_path, capsys):
    assert (
        cli.main(["bench", "chaos", str(frozen), "--kills", "1", "--processes", "1", "--work", str(tmp_path / "w")])
        == 0
    )
    assert "the same, bit for bit" in capsys.readouterr().out
    whole, broken = tmp_path / "w" / "whole-1-0", tmp_path / "w" / "broken-0"
    assert differences(whole, broken, 1) == []

    path = checkpoints(broken / "checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    name = next(name for name, value in state["state_dict"].items() if value.is_floating_point() and value.numel() > 9)
    weight, place = state["state_dict"][name], (0,) * state["state_dict"][name].dim()
    weight[place] = torch.nextafter(weight[place], torch.tensor(9.0))  # one bit of one weight
    write_checkpoint(state, path)
    (found,) = differences(whole, broken, 1)
    assert found == f"1 tensors of state_dict differ, {name} first"

    shutil.copytree(whole, broken, dirs_exist_ok=True)
    ledger = broken / "ledger" / "rank-0.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines[2]["keys"][0] = lines[1]["keys"][0]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(whole, broken, 1) == [
        f"the ledger of rank 0 differs, {len(lines)} lines instead of {len(lines)}",
        "a sample was used twice in epoch 0",
    ]

    shutil.copytree(whole, broken, dirs_exist_ok=True)
    metrics = broken / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    (found,) = differences(whole, broken, 1)
    assert found.startswith("metrics.csv has")
