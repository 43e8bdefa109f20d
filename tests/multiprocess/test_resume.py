"""An interrupted run ends with the bits of one that was not, on the same number of ranks."""

import json
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline import run
from pipeline.callbacks import agreement
from pipeline.callbacks.journal import read_journal
from pipeline.callbacks.population import Population
from pipeline.callbacks.preemption import InterruptedRunError, Preemption
from pipeline.cli.settling import settled
from pipeline.config import Config, completed, compose_config
from pipeline.launch.plan import open_run, read_record
from pipeline.run import assembly
from pipeline.run.failures import interruptible
from pipeline.training.checkpoint import checkpoints
from pipeline.training.checkpoint_io import CheckpointError
from pipeline.world import World
from tests.multiprocess.ranks import run_ranks


def config(shards: Path, directory: Path, name: str, world: int, *overrides: str) -> Config:
    composed = compose_config(
        ["recipe=bn_x5", "data=folder", f"data.root={shards}", f"run.dir={directory}", f"run.id={name}",
         "data.image_size=16", "model.stem=small", "model.width=0.125", "data.global_batch_size=24",
         "trainer.max_epochs=3", "trainer.threads=1", "tracking.every_steps=1", "tracking.mode=disabled",
         "norm.precise_images=48", "cluster.accelerator=cpu", f"cluster.devices={world}", "ledger=true",
         "trainer.checkpoint_every_steps=4", "trainer.keep_checkpoints=99", *overrides]
    )  # fmt: skip
    return open_run(settled(composed))


def train_rank(rank: int, world: int, settings: Config, stop_at: int) -> bool:
    """Train; the last rank alone gets a signal before step stop_at ends. Whether the run was interrupted."""
    noticed = Preemption.on_train_batch_end
    agreement.SECONDS = 0.0  # ask after every step; what is asked after one step is answered after the next

    def interrupt(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == stop_at and rank == world - 1:
            signal.raise_signal(signal.SIGTERM)
        noticed(self, trainer, pl_module, outputs, batch, batch_idx)

    if stop_at:
        Preemption.on_train_batch_end = interrupt
    try:
        run.train(settings, World.from_environment(), Console(quiet=True))
    except InterruptedRunError:
        return True
    finally:
        Preemption.on_train_batch_end = noticed
    return False


def final(directory: Path) -> dict:
    return torch.load(checkpoints(directory / "checkpoints")[-1], weights_only=True)


def journal(directory: Path) -> list[tuple]:
    return [(r.step, r.split, r.loss, r.top1, r.rate) for r in read_journal(directory / "metrics.csv")]


def beside(directory: Path) -> list[tuple]:
    """What validations say of other weights and statistics than their own."""
    return [
        (r.trained_loss, r.trained_top1, r.running_loss, r.running_top1)
        for r in read_journal(directory / "metrics.csv")
    ]


STOPS = [
    (1, 3, []), (1, 5, []), (2, 7, ["tracking.every_steps=5"]), (3, 7, []), (1, 10, ["trainer.max_steps=15"]),
    (1, 5, ["trainer.max_steps=15", "trainer.validate_every_epochs=2"]), (2, 6, ["trainer.precision=64"]),
    (1, 8, ["recipe=bn_baseline", "model.stem=small"]),
    pytest.param(2, 7, ["optimizer.name=lars", "schedule.form=polynomial", "schedule.warmup_epochs=1",
                        "optimizer.nesterov=true"], marks=pytest.mark.slow),
    (2, 8, ["augment.mixup=0.4", "augment.cutmix=1", "augment.operations=2", "loss.label_smoothing=0.1",
            "augment.first_size=0.5", "augment.growth_steps=2", "augment.growth_epochs=2", "cluster.workers=1"]),
    (2, 8, ["averaging.decay=0.9", "averaging.every_steps=2", "averaging.start_epochs=0.5"]),
    (1, 5, ["averaging.decay=0.9", "trainer.validate_every_epochs=2", "trainer.precision=64"]),
    (2, 7, ["optimizer.name=lamb", "schedule.form=cosine", "optimizer.rate=0.001", "trainer.precision=bf16"]),
]  # fmt: skip


@pytest.mark.parametrize(("world", "stop_at", "more"), STOPS)
def test_an_interrupted_run_is_the_same_run(shards, tmp_path, world, stop_at, more):
    whole = config(shards, tmp_path, "whole", world, *more)
    assert run_ranks(world, train_rank, whole, 0) == [False] * world
    broken = config(shards, tmp_path, "broken", world, *more)
    assert run_ranks(world, train_rank, broken, stop_at) == [True] * world
    assert final(broken.directory)["global_step"] == stop_at + (world > 1)
    again = config(shards, tmp_path, "broken", world, *more)
    assert run_ranks(world, train_rank, again, 0) == [False] * world

    left, right = final(whole.directory), final(again.directory)
    assert left["global_step"] == right["global_step"] == 15
    for kind in ("state_dict", "averaged"):
        for name, value in left.get(kind, {}).items():
            assert torch.equal(value, right[kind][name]), name
    momenta = [c["optimizer_states"][0]["state"] for c in (left, right)]
    assert momenta[0].keys() == momenta[1].keys()
    for ours, theirs in zip(momenta[0].values(), momenta[1].values(), strict=True):
        assert ours.keys() == theirs.keys() & {"momentum_buffer", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert journal(again.directory) == journal(whole.directory)
    assert beside(again.directory) == beside(whole.directory)
    for rank in range(world):
        ledgers = [(c.directory / "ledger" / f"rank-{rank}.jsonl").read_text() for c in (whole, again)]
        assert ledgers[0] == ledgers[1]


def keys(config: Config, world: int) -> list[list[str]]:
    """The samples of every step over all ranks, in the order of the global batch."""
    ledgers = [(config.directory / "ledger" / f"rank-{r}.jsonl").read_text().splitlines() for r in range(world)]
    return [sorted(key for line in step for key in json.loads(line)["keys"]) for step in zip(*ledgers, strict=True)]


def train_on(shards: Path, directory: Path, name: str, world: int, stop_at: int, *overrides: str) -> Config:
    settings = config(shards, directory, name, world, "trainer.precision=64", *overrides)
    run_ranks(world, train_rank, settings, stop_at)
    return settings


@pytest.mark.parametrize(("before", "after"), [(0, 5), (5, 0), (7, 4)])
def test_another_micro_batch_goes_on_at_the_next_sample(shards, tmp_path, before, after):
    whole = keys(train_on(shards, tmp_path, "whole", 1, 0), 1)
    train_on(shards, tmp_path, "broken", 1, 7, f"data.micro_batch_size={before}")
    again = train_on(shards, tmp_path, "broken", 1, 0, f"data.micro_batch_size={after}")
    assert keys(again, 1) == whole
    assert [row[:2] for row in journal(again.directory)] == [row[:2] for row in journal(tmp_path / "whole")]


@pytest.mark.parametrize(("precision", "rate", "tolerance"), [("64", 0.0075, 1e-9), ("32", 0.00005, 0.05)])
def test_two_then_three_ranks_then_one_go_on_at_the_next_sample(shards, tmp_path, precision, rate, tolerance):
    """In float64 no loss moves by more than 4e-12. A network of statistics over few values magnifies float32's other
    order of sums: by 0.01 with weights that hardly move, by 0.2 with the recipe's rate, as between uninterrupted runs.
    """
    more = (f"trainer.precision={precision}", f"optimizer.rate={rate}")
    whole = keys(train_on(shards, tmp_path, "whole", 1, 0, *more), 1)
    steps: dict[int, list[str]] = {}
    for world, stop_at, workers in ((2, 4, 1), (3, 9, 0), (1, 0, 2)):
        again = train_on(shards, tmp_path, "broken", world, stop_at, *more, f"cluster.workers={workers}")
        written = [path.read_text().splitlines() for path in (again.directory / "ledger").iterdir()]
        lines = [json.loads(line) for lines in written for line in lines]
        steps = {line["step"]: sorted(k for other in lines if other["step"] == line["step"] for k in other["keys"])
                 for line in lines}  # fmt: skip
        assert len(steps) == (stop_at + 1 if stop_at else 15)
    assert [steps[step] for step in sorted(steps)] == whole
    losses, expected = ([row[2] for row in journal(tmp_path / name)] for name in ("broken", "whole"))
    assert losses == pytest.approx(expected, abs=tolerance)
    worlds = [start["world"] for start in read_record(tmp_path / "broken").starts]
    assert worlds == [2, 3, 1]


def stopped_rank(rank: int, world: int, settings: Config, number: int, where: str) -> str:
    """Train; the last rank alone gets a signal before its first step, or in the validation after its last."""
    started = Population.on_validation_start

    def interrupt(self, trainer, pl_module):
        if trainer.state.fn == "validate" and rank == world - 1 and where == "end":
            signal.raise_signal(number)
        started(self, trainer, pl_module)

    Population.on_validation_start = interrupt
    announced = assembly.build_strategy

    def before(*arguments):
        if rank == world - 1 and where == "start":
            signal.raise_signal(number)
        return announced(*arguments)

    assembly.build_strategy = before
    try:
        run.train(settings, World.from_environment(), Console(quiet=True))
    except Exception as error:
        return type(error).__name__
    return "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow),
                                    pytest.param(signal.SIGINT, marks=pytest.mark.slow)])  # fmt: skip
def test_a_signal_after_the_last_step_ends_all_ranks_and_the_next_start_ends_the_run(shards, tmp_path, number):
    more = ("trainer.validate_every_epochs=0",)
    whole = config(shards, tmp_path, "whole", 2, *more)
    run_ranks(2, train_rank, whole, 0)
    settings = config(shards, tmp_path, "broken", 2, *more)
    said = run_ranks(2, stopped_rank, settings, number, "end", seconds=30)
    assert said[1] == "InterruptedRunError"
    assert said[0] in ("InterruptedRunError", "FailedRunError")  # it lost its partner
    assert [row[1] for row in journal(settings.directory)] == ["train"] * 15
    run_ranks(2, train_rank, config(shards, tmp_path, "broken", 2, *more), 0)
    assert journal(settings.directory) == journal(whole.directory)


def test_a_signal_in_the_last_step_leaves_the_validation_to_the_next_start(shards, tmp_path):
    more = ("trainer.validate_every_epochs=0",)
    whole = config(shards, tmp_path, "whole", 2, *more)
    run_ranks(2, train_rank, whole, 0)
    assert run_ranks(2, train_rank, config(shards, tmp_path, "broken", 2, *more), 15) == [True, True]
    assert [row[:2] for row in journal(tmp_path / "broken")] == [(step, "train") for step in range(1, 16)]
    again = config(shards, tmp_path, "broken", 2, *more)
    assert run_ranks(2, train_rank, again, 0) == [False, False]
    assert journal(again.directory) == journal(whole.directory)


def test_a_signal_is_no_fault_of_what_it_interrupts():
    def read() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:  # as whoever reads a checkpoint or speaks to a server takes any error for a fault
            pytest.fail("it was swallowed")

    with pytest.raises(InterruptedRunError), interruptible():
        read()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_before_the_first_step_is_an_interruption(shards, tmp_path):
    assert run_ranks(1, stopped_rank, config(shards, tmp_path, "run", 1), signal.SIGTERM, "start") == [
        "InterruptedRunError"
    ]


def refused_rank(rank: int, world: int, settings: Config, elsewhere: Path) -> str:
    """Train with another run directory than rank 0 has."""
    if rank:
        settings = completed(settings, run={"dir": str(elsewhere)})
    with pytest.raises(CheckpointError) as caught:
        run.train(settings, World.from_environment(), Console(quiet=True))
    return str(caught.value)


def test_nodes_that_do_not_see_one_directory_are_refused(shards, tmp_path):
    train_on(shards, tmp_path / "shared", "run", 2, 7)
    train_on(shards, tmp_path / "own", "run", 2, 3)
    settings = config(shards, tmp_path / "shared", "run", 2, "trainer.precision=64")
    said = run_ranks(2, refused_rank, settings, tmp_path / "own")
    assert said == ["ranks go on from different checkpoints, of steps [4, 8]: run.dir must be one directory that all "
                    "nodes see"] * 2  # fmt: skip


def test_a_run_cut_by_max_steps_goes_on_in_the_middle_of_the_epoch(shards, tmp_path):
    whole = train_on(shards, tmp_path, "whole", 1, 0)
    short = train_on(shards, tmp_path, "short", 1, 0, "trainer.max_steps=8")
    assert checkpoints(short.directory / "checkpoints")[-1].name == "step-00000008.ckpt"
    assert journal(short.directory)[-1][:2] == (8, "val")  # the last step is validated, wherever it falls
    again = train_on(shards, tmp_path, "short", 1, 0)
    assert keys(again, 1) == keys(whole, 1)
    for name, value in final(whole.directory)["state_dict"].items():
        assert torch.equal(value, final(again.directory)["state_dict"][name]), name


def test_a_finished_run_resumed_does_nothing_more(shards, tmp_path):
    done = config(shards, tmp_path, "done", 1)
    run_ranks(1, train_rank, done, 0)
    before = journal(done.directory)
    run_ranks(1, train_rank, config(shards, tmp_path, "done", 1), 0)
    assert journal(done.directory) == before
