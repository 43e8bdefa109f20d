"""Running averages are scored beside population statistics, and nothing else is different for it."""

import csv
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline.callbacks.journal import read_journal
from pipeline.cli.settling import settle, settled
from pipeline.data.evaluation_set import own_images
from pipeline.launch.plan import open_run
from pipeline.run.evaluating import ask, evaluate
from pipeline.training.checkpoint import checkpoints
from pipeline.world import World
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_law import law_config, train_rank

STEPS = 7  # an epoch of 5, and 2 of the next


def trained(shards: Path, directory: Path, world: int, *overrides: str):
    name = f"w{world}{'-'.join(overrides).replace('=', '_')}"
    config = law_config(
        shards, directory, f"run.id={name}", f"cluster.devices={world}", f"trainer.max_steps={STEPS}",
        "trainer.validate_every_epochs=1", "trainer.keep_checkpoints=9", *overrides,
    )  # fmt: skip
    config = open_run(settled(config))
    run_ranks(world, train_rank, config)
    return config


@pytest.fixture(scope="module")
def compared(shards, tmp_path_factory):
    return trained(shards, tmp_path_factory.mktemp("runs"), 1, "norm.compare=true")


def rank_of_evaluation(rank, world, config, checkpoint):
    config, dataset = settle(config)
    source = own_images(dataset, config.data.num_classes)
    evaluate(ask(config, source, checkpoint, 1), World.from_environment(), Console(quiet=True))


def evaluated(config, checkpoint: Path, *overrides: str) -> dict:
    from pipeline.config import read_config

    again = settled(read_config(config.directory / "config.yaml", overrides))
    run_ranks(again.world, rank_of_evaluation, again, checkpoint)
    return json.loads((config.directory / "evaluation.json").read_text())


def validations(config):
    return [row for row in read_journal(config.directory / "metrics.csv") if row.split == "val"]


def test_both_are_columns_of_each_validation(compared):
    rows = validations(compared)
    assert [row.step for row in rows] == [5, 7]
    for row in rows:
        assert abs(row.loss - row.running_loss) > 1e-3  # other statistics, other scores
        assert row.running_top5 >= row.running_top1
    with (compared.directory / "metrics.csv").open() as file:
        assert all(line["running_loss"] == "" for line in csv.DictReader(file) if line["split"] == "train")


def test_looking_changes_no_bit(compared, shards, tmp_path):
    alone = trained(shards, tmp_path, 1)
    mine, other = (checkpoints(c.directory / "checkpoints") for c in (compared, alone))
    assert [path.name for path in mine] == [path.name for path in other]
    for left, right in zip(mine, other, strict=True):
        states = [torch.load(path, weights_only=True)["state_dict"] for path in (left, right)]
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    for left, right in zip(validations(compared), validations(alone), strict=True):
        assert (left.loss, left.top1, left.top5) == (right.loss, right.top1, right.top5)
        assert right.running_loss is None


def test_an_evaluation_finds_the_running_averages_of_before_the_validation(compared):
    """The checkpoint of an epoch's end holds the population's in its weights, and the averages beside them."""
    of_epoch, of_stop = checkpoints(compared.directory / "checkpoints")
    for path, row in zip((of_epoch, of_stop), validations(compared), strict=True):
        found = evaluated(compared, path)
        assert found["loss"] == pytest.approx(row.loss, abs=1e-12)
        running = found["running_averages"]
        assert running["loss"] == pytest.approx(row.running_loss, abs=1e-12)
        assert (running["top1"], running["images"]) == (row.running_top1, 35)
    # The one in the middle of an epoch has them in its weights: evaluation with those alone agrees.
    alone = evaluated(compared, of_stop, "norm.compare=false", "norm.precise_images=0")
    assert alone["loss"] == pytest.approx(row.running_loss, abs=1e-12)
    assert "running_averages" not in alone


def test_they_do_not_depend_on_ranks(compared, shards, tmp_path):
    three = validations(trained(shards, tmp_path, 3, "norm.compare=true"))
    for one, several in zip(validations(compared), three, strict=True):
        assert several.running_loss == pytest.approx(one.running_loss, abs=1e-9)
        assert several.loss == pytest.approx(one.loss, abs=1e-9)
