"""Averaged weights are a checkpoint like others, with population statistics of their own."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from pipeline.callbacks.journal import read_journal
from pipeline.cli import main
from pipeline.norm.statistics import statistics_among
from pipeline.run import averaging
from pipeline.run.assembly import build_trainer
from pipeline.training.checkpoint import checkpoints
from pipeline.training.checkpoint_io import STAMP
from pipeline.world import World
from tests.callbacks.test_statistics import trained


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):
    """A run of 7 steps, with checkpoints after 5 and 7."""
    return trained(shards, tmp_path_factory.mktemp("runs"), 1)


@pytest.fixture(scope="module")
def soup(first):
    """`pipeline average RUN --last 2`, once for all tests."""
    output = first.directory / "average.ckpt"
    assert main(["average", str(first.directory), "--last", "2"]) == 0
    return torch.load(output, weights_only=True), output


def states(config):
    return [torch.load(path, weights_only=True)["state_dict"] for path in checkpoints(config.directory / "checkpoints")]


def test_weights_are_the_mean_and_statistics_are_not(first, soup):
    content, _ = soup
    left, right = states(first)
    statistics = statistics_among(left).keys()
    for name, value in content["state_dict"].items():
        mean = (left[name] + right[name]) / 2
        if name in statistics:
            assert not torch.equal(value, mean)
        elif value.is_floating_point():
            torch.testing.assert_close(value, mean, rtol=0, atol=1e-15)
    assert (content["global_step"], content[STAMP]["identity"]["seed"]) == (7, 0)
    assert content["soup"]["members"] == [f"{first.run.id}/step-{step:08d}" for step in (5, 7)]


def test_the_table_scores_members_and_the_average_with_both_statistics(first, soup):
    content, _ = soup
    rows = content["soup"]["scores"]
    assert [row["statistics"] for row in rows] == ["estimated anew"] * 3 + ["averages of the members'"]
    validated = [row for row in read_journal(first.directory / "metrics.csv") if row.split == "val"]
    for row, known in zip(rows, validated, strict=False):
        assert row["loss"] == pytest.approx(known.loss, abs=1e-12)
        assert (row["top1"], row["images"]) == (known.top1, 35)
    assert abs(rows[2]["loss"] - rows[3]["loss"]) > 1e-4


@pytest.mark.parametrize("how", [["norm.precise_images=60", "norm.compare=true"], ["norm.precise_images=0"]])
def test_an_evaluation_of_it_gives_the_same_scores(first, soup, how):
    """Whether it estimates the statistics again, or takes those in the file."""
    content, path = soup
    assert main(["evaluate", str(first.directory), "--checkpoint", str(path), *how]) == 0
    found = json.loads((first.directory / "evaluation.json").read_text())
    assert "running_averages" not in found  # of averaged weights there are none
    is_estimated = "norm.precise_images=0" not in how
    kind = "60 training images at most" if is_estimated else "as estimated when it was averaged"
    assert found["statistics"] == f"population, {kind}"
    assert found["loss"] == pytest.approx(content["soup"]["scores"][2]["loss"], abs=1e-9)


def test_three_processes_make_the_same_average_and_scores(first, soup, tmp_path):
    content, _ = soup
    output = tmp_path / "three.ckpt"
    words = [str(first.directory), "--last", "2", "--output", str(output), "cluster.devices=3"]
    assert main(["average", *words]) == 0
    again = torch.load(output, weights_only=True)
    for name, value in content["state_dict"].items():
        torch.testing.assert_close(again["state_dict"][name], value, rtol=1e-9, atol=1e-12)
    for row, known in zip(again["soup"]["scores"], content["soup"]["scores"], strict=True):
        assert row == {**known, "loss": pytest.approx(known["loss"], abs=1e-9)}


def test_ranks_exchange_nothing_before_the_trainer_has_moved_the_network(first, tmp_path, monkeypatch):
    """nccl exchanges nothing that lies on the CPU."""
    exchanged, before = [], []

    def build(run, callbacks):
        before.extend(exchanged)
        return build_trainer(run, callbacks)

    def averaged(values):
        exchanged.append(len(values))
        return values

    monkeypatch.setattr("pipeline.norm.statistics.average_over_world", averaged)
    monkeypatch.setattr(averaging, "build_trainer", build)
    members = checkpoints(first.directory / "checkpoints")
    output = tmp_path / "again.ckpt"
    averaging.average(first, World(), Console(quiet=True), members=members, output=output, with_members=False)
    assert exchanged
    assert not before


def test_what_cannot_be_averaged_is_one_line(first, soup, shards, tmp_path, capsys):
    here, (_, path) = str(first.directory), soup
    folder = first.directory / "checkpoints"
    one, two = (str(each) for each in checkpoints(folder))

    def refused(code: int, *words: str) -> str:
        capsys.readouterr()
        assert main(["average", *words, "--output", str(tmp_path / "x.ckpt")]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "x.ckpt").exists()
        return error

    assert "alone is no average; give --last 2 or more" in refused(2, here)
    assert "has 2 checkpoints; ask for fewer" in refused(2, here, "--last", "3")
    assert "neither a run nor a checkpoint" in refused(2, here, "nowhere")
    assert "given twice" in refused(2, one, one)
    assert "norm.precise_images = 0 estimates no statistics" in refused(2, one, two, "norm.precise_images=0")
    assert main(["average", one, two, "--output", str(path)]) == 2
    assert "is there already; give another --output" in capsys.readouterr().err
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((folder / "step-00000005.ckpt").read_bytes()[:-9])
    assert "is no whole checkpoint: torn or damaged" in refused(3, one, str(damaged))
    shutil.copy(one, tmp_path / "lonely.ckpt")
    assert "lies in no run" in refused(2, str(tmp_path / "lonely.ckpt"), two)
    other = trained(shards, tmp_path, 1, "model.width=0.25", "trainer.max_steps=1")
    theirs = str(checkpoints(other.directory / "checkpoints")[0])
    assert "is of another network: model.width = 0.25, " in refused(2, one, theirs)
    single = trained(shards, tmp_path, 1, "model.per_activation=1", "trainer.max_steps=1")
    theirs = str(checkpoints(single.directory / "checkpoints")[0])
    assert "is of another network: model.per_activation = 1, " in refused(2, one, theirs)


def test_members_of_other_beginnings_are_warned_of(first, shards, tmp_path, capsys):
    """Initial weights and dropout make no other network."""
    other = trained(shards, tmp_path, 1, "seed=1", "model.initial_gain=1.5", "model.dropout=0.1", "trainer.max_steps=1")
    output = tmp_path / "both.ckpt"
    words = [str(first.directory), str(other.directory), "--output", str(output), "--no-members"]
    assert main(["average", *words]) == 0
    assert "WARNING: the members began with different weights (seeds 0, 1)" in capsys.readouterr().out
    assert output.exists()
