"""Fine-tuning is a run like any other: interrupted it is the same run, and what it begins from pays."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline import run
from pipeline.callbacks.journal import read_journal
from pipeline.cli.settling import settled
from pipeline.config import Config, compose_config
from pipeline.launch.plan import open_run
from pipeline.world import World
from tests.export.runs import run_of
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config, final, journal, train_rank

SMALL = ["model.stem=small", "model.width=0.125", "data.image_size=16", "data.num_classes=9"]


@pytest.fixture(scope="module")
def weights(shards, tmp_path_factory) -> Path:
    """Of a run with other classes."""
    directory = tmp_path_factory.mktemp("weights")
    return run_of(shards, directory, *SMALL).directory / "checkpoints" / "step-00000007.ckpt"


@pytest.mark.parametrize(("world", "frozen"), [(2, "statistics"), (1, "all"), (3, '""')])
def test_an_interrupted_fine_tuning_is_the_same_run_and_needs_its_file_no_more(
    shards, tmp_path, weights, world, frozen
):
    file = tmp_path / "begin.ckpt"
    file.write_bytes(weights.read_bytes())
    more = [f"model.init={file}", f"norm.frozen={frozen}", "tracking.norms_every_steps=2"]
    whole = config(shards, tmp_path, "whole", world, *more)
    assert run_ranks(world, train_rank, whole, 0) == [False] * world
    broken = config(shards, tmp_path, "broken", world, *more)
    assert run_ranks(world, train_rank, broken, 7) == [True] * world
    file.unlink()
    again = config(shards, tmp_path, "broken", world, *more)  # as typed again: the run knows the file's digest
    assert again.model.init_digest == broken.model.init_digest
    assert run_ranks(world, train_rank, again, 0) == [False] * world
    left, right = final(whole.directory), final(again.directory)
    assert left["global_step"] == right["global_step"]
    for name, tensor in left["state_dict"].items():
        assert torch.equal(tensor, right["state_dict"][name]), name
    assert journal(whole.directory) == journal(again.directory)
    before = torch.load(weights, weights_only=True)["state_dict"]
    held = {name for name in before if torch.equal(before[name], left["state_dict"].get(name, torch.zeros(())))}
    assert any("running_mean" in name for name in held) == (frozen != '""')
    assert any("norm.weight" in name for name in held) == (frozen == "all")
    assert not any("conv.weight" in name for name in held)


def trained(directory: Path, name: str, steps: int, *more: str) -> Config:
    words = ["recipe=bn_x5", "data=digits", f"data.root={directory}/digits", f"run.dir={directory}", f"run.id={name}",
             "model.width=0.125", f"trainer.max_steps={steps}", "trainer.threads=1", "tracking.mode=disabled",
             "norm.precise_images=256", "cluster.accelerator=cpu", *more]  # fmt: skip
    made = open_run(settled(compose_config(words)))
    run.train(made, World(), Console(quiet=True))
    return made


def accuracy(made: Config) -> float:
    return [row.top1 for row in read_journal(made.directory / "metrics.csv") if row.split == "val"][-1]


@pytest.mark.slow
def test_fine_tuning_is_ahead_of_a_beginning_from_nothing_after_a_few_steps(tmp_path):
    first = trained(tmp_path, "first", 90, "data.num_classes=12", "seed=3")
    start = f"model.init={first.directory}/checkpoints/step-00000090.ckpt"
    scratch = accuracy(trained(tmp_path, "scratch", 12))
    tuned = accuracy(trained(tmp_path, "tuned", 12, start))
    frozen = accuracy(trained(tmp_path, "frozen", 12, start, "norm.frozen=statistics"))
    assert tuned > scratch + 0.2
    assert frozen > scratch + 0.2
