"""W&B has the history of a run once and whole, whatever happened to its processes or to the server."""

import io
import itertools
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import lightning
import pytest
import wandb
from rich.console import Console

from pipeline import run
from pipeline.callbacks import agreement, wandb_reporter
from pipeline.callbacks.journal import read_journal
from pipeline.callbacks.preemption import InterruptedRunError
from pipeline.callbacks.segments import position, position_of, segments, values
from pipeline.callbacks.sync import synchronize
from pipeline.callbacks.tracking import Tracking
from pipeline.callbacks.wandb_server import WandbPlace
from pipeline.config import Config, read_config
from pipeline.launch.code_state import code_state
from pipeline.launch.plan import read_record
from pipeline.training.checkpoint import checkpoints
from pipeline.world import World
from tests.callbacks.test_metrics import documented
from tests.callbacks.wandb_server import KEY, WandbServer
from tests.multiprocess import ranks
from tests.multiprocess.test_resume import config, journal


def train_rank(rank: int, world: int, settings: Config, stop: tuple[int, int, float], environment: dict) -> bool:
    """Train; rank 0 meets a signal after a step, some seconds after its row. Whether the run was interrupted."""
    os.environ.pop("WANDB_API_KEY", None)
    os.environ.update(environment)
    agreement.SECONDS = 0.0
    step, number, seconds = stop
    wandb_reporter.INIT_SECONDS, wandb_reporter.FINISH_SECONDS = 15.0, 2.0  # a loaded machine begins slowly
    wandb_reporter.FLUSH_SECONDS = 0.2 if seconds else 60.0
    reported = Tracking.on_train_batch_end

    def interrupt(self, trainer, *arguments):
        reported(self, trainer, *arguments)
        if trainer.global_step == step and rank == 0:
            time.sleep(seconds)
            signal.raise_signal(number)

    Tracking.on_train_batch_end = interrupt
    try:
        run.train(settings, World.from_environment(), Console(quiet=True))
    except InterruptedRunError:
        return True
    return False


def train(settings: Config, *stop, **environment: str) -> list[bool] | None:
    """All ranks to their end; None where SIGKILL was it."""
    world = settings.world
    if not stop or stop[1] != signal.SIGKILL:
        return ranks.run_ranks(world, train_rank, settings, stop or (0, 0, 0.0), environment)
    with pytest.raises(AssertionError, match=r"killed|failed"):
        ranks.run_ranks(world, train_rank, settings, stop, environment)
    return None


def on_disk(settings: Config) -> list[tuple]:
    found = segments(settings.directory, read_record(settings.directory).wandb_id)
    rows = [row for segment in found for row in segment.rows()]
    split = {0: "train", 1: "val"}
    return [(r["step"], s := split[position_of(r) % 2], r[f"{s}/loss"], r[f"{s}/top1"], r.get("train/rate"))
            for r in rows]  # fmt: skip


def place(settings: Config) -> WandbPlace:
    return WandbPlace(id=read_record(settings.directory).wandb_id, name="broken", project="pipeline", entity=None,
                      group=None, tags=[])  # fmt: skip


# killed at once, with rows that W&B has not written; killed later, with rows beyond the checkpoint of step 4; stopped
@pytest.mark.parametrize(
    ("world", "number", "seconds"),
    [(1, signal.SIGKILL, 0.0), (2, signal.SIGKILL, 1.0), (1, signal.SIGTERM, 0.0), (2, signal.SIGTERM, 0.0)],
)
def test_offline_segments_of_an_interrupted_run_are_its_journal(shards, tmp_path, world, number, seconds):
    def opened() -> Config:
        return config(shards, tmp_path, "broken", world, "tracking.mode=auto")

    interrupted = train(opened(), 7, number, seconds)
    assert interrupted == (None if number == signal.SIGKILL else [True] * world)
    before = on_disk(opened())
    assert len(before) == (8 + world - 1 if number == signal.SIGTERM else 8 if seconds else 0)
    train(opened())
    rows = journal(tmp_path / "broken")
    assert [row[:2] for row in rows][-2:] == [(15, "train"), (15, "val")]
    assert on_disk(opened()) == rows
    with WandbServer() as server:
        os.environ.update(server.environment)
        wandb.teardown()  # a test before this one may have asked another server, which W&B's client keeps to
        try:
            assert synchronize(tmp_path / "broken", place(opened()), seconds=60) == len(rows)
        finally:
            wandb.teardown()
            for name in server.environment:
                del os.environ[name]
        assert server.steps() == [row[:2] for row in rows]


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 1.0), (signal.SIGTERM, 0.0)])
def test_the_server_has_one_run_with_every_step_once(shards, tmp_path, number, seconds):
    with WandbServer() as server:
        for stop in ((7, number, seconds), ()):
            train(config(shards, tmp_path, "broken", 1, "tracking.mode=auto"), *stop, **server.environment)
            if stop and number == signal.SIGTERM:
                assert (server.run.preempting, server.run.exit_code) == (True, 75)
        assert len(server.runs) == 1
        assert server.run.exit_code == 0
        assert server.steps() == [row[:2] for row in journal(tmp_path / "broken")]
        steps = [line["_step"] for line in server.run.history]
        assert steps == [position(row.step, row.split) for row in read_journal(tmp_path / "broken" / "metrics.csv")]


def test_a_run_with_two_restarts_is_one_run_with_config_summary_and_artifacts_under_documented_names(shards, tmp_path):
    def opened() -> Config:
        settings = config(shards, tmp_path, "broken", 2, "tracking.mode=auto", "tracking.artifacts=files")
        shutil.copy(shards / "dataset.json", settings.directory)  # as `pipeline train` does
        return settings

    with WandbServer() as server:
        for stop in ((7, signal.SIGTERM, 0.0), (11, signal.SIGKILL, 1.0), ()):
            train(opened(), *stop, **server.environment)
        directory, identity = tmp_path / "broken", read_record(tmp_path / "broken").wandb_id
        assert list(server.runs) == [identity]
        assert len(read_record(directory).starts) == 3
        rows = read_journal(directory / "metrics.csv")
        assert server.steps() == [(row.step, row.split) for row in rows]
        known = {name for row in rows for name in values(row)}
        history = {name for line in server.run.history for name in line if not name.startswith(("_", "system/"))}
        assert history == known <= {name for names in documented().values() for name in names}
        assert {name: server.run.summary[name] for name in known} == {
            name: value for row in rows for name, value in values(row).items()
        }
        sent = {key: value["value"] for key, value in server.run.config.items() if key != "_wandb"}
        assert sent.pop("code")["code"] == code_state().digest
        assert sent == json.loads(json.dumps(asdict(read_config(directory / "config.yaml"))))
        last, best = (server.version(f"checkpoint-{identity}:{alias}") for alias in ("last", "best"))
        newest = checkpoints(directory / "checkpoints")[-1]
        assert last.content == {"model.ckpt": newest.read_bytes()}
        assert best.content == {"model.ckpt": (directory / "checkpoints" / "best.ckpt").read_bytes()}
        assert best.metadata["top1"] == max(row.top1 for row in rows if row.split == "val")
        interrupted = read_record(directory).starts[1]["step"]
        assert server.version(f"checkpoint-{identity}:step-{interrupted}").by == identity
        data = server.version("dataset-folder:latest")
        assert data.used_by == [identity]
        assert data.metadata["digest"] == opened().data.digest


def test_no_fault_of_the_server_changes_the_training(shards, tmp_path):
    whole = config(shards, tmp_path, "whole", 1)
    train(whole)
    expected = journal(whole.directory)
    for name, fault in {"500": {"file_stream": 500}, "401": {"every": 401}}.items():
        settings = config(shards, tmp_path, name, 1, "tracking.mode=auto")
        with WandbServer(**fault) as server:
            assert train(settings, **server.environment) == [False]
        assert journal(settings.directory) == expected
        assert on_disk(settings) == expected
    settings = config(shards, tmp_path, "none", 1, "tracking.mode=auto")
    assert train(settings, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9") == [False]
    assert journal(settings.directory) == on_disk(settings) == expected


class Paced(lightning.Callback):
    """Half a second a step; writes down when each ended."""

    def __init__(self, ends: Path):
        self.ends = ends

    def on_train_batch_end(self, *_: object) -> None:
        time.sleep(0.5)
        with self.ends.open("a") as file:
            file.write(f"{time.monotonic()}\n")


def train_paced(rank: int, world: int, settings: Config, ends: Path, environment: dict) -> str:
    """Train at that pace; returns what the run said."""
    os.environ.update(environment)
    said = io.StringIO()
    run.train(settings, World.from_environment(), Console(file=said, width=200), [Paced(ends)])
    return said.getvalue()


@pytest.mark.slow
def test_a_server_that_hangs_for_a_minute_costs_no_step_time_and_no_row(shards, tmp_path):
    settings = config(shards, tmp_path, "hung", 1, "tracking.mode=auto", "trainer.max_epochs=30", "ledger=false",
                      "trainer.validate_every_epochs=15", "trainer.checkpoint_every_steps=75")  # fmt: skip
    ends = tmp_path / "ends"
    with WandbServer() as server:

        def hang() -> None:
            server.until(10, seconds=120)
            server.fault["every"] = 60.0  # whatever is asked from now on is answered a minute later
            time.sleep(60)
            server.fault.clear()

        hanging = threading.Thread(target=hang)
        hanging.start()
        (said,) = ranks.run_ranks(1, train_paced, settings, ends, server.environment)
        hanging.join()
        assert "not confirmed" not in said
        assert server.steps() == [(row.step, row.split) for row in read_journal(settings.directory / "metrics.csv")]
        assert max(server.steps())[0] == 150
    times = [float(line) for line in ends.read_text().splitlines()]
    steps = sorted(after - before for before, after in itertools.pairwise(times))
    assert len(steps) == 149
    assert steps[-1] < 10  # a validation and a checkpoint included; one step that waited would take 60
