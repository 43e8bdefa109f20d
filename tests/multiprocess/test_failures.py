"""A rank of a real run hangs, dies or returns NaN: it is named, all processes end, and the exit code is right."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.training.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    code: int
    errors: str
    seconds: float
    directory: Path

    @property
    def line(self) -> str:
        """The one line that says why."""
        said = [line for line in self.errors.splitlines() if line.startswith("pipeline: ")]
        assert len(said) == 1, self.errors
        return said[0]


@pytest.fixture
def train(shards, tmp_path):
    """Runs `pipeline train` on three ranks (unless told otherwise) with a fault in rank 1, until nothing is left."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ or 'ALONE' in os.environ:\n"
                                                        "    import tests.multiprocess.faults\n")  # fmt: skip

    def start(fault: str, *overrides: str, devices: int = 3, name: str = "run", seconds: float = 60) -> Ended:
        mark = f"{tmp_path.name}-{time.monotonic_ns()}"
        environment = {**os.environ, "FAULT": fault, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "MARK": mark}
        environment |= {"FAULTY_RANK": "0", "ALONE": "1"} if devices == 1 else {}
        command = [
            sys.executable, "-m", "pipeline", "train", "recipe=bn_x5", "data=folder", f"data.root={shards}",
            f"run.dir={tmp_path}", f"run.id={name}", "data.image_size=16", "model.stem=small", "model.width=0.0625",
            "data.global_batch_size=24", "trainer.max_epochs=2", "trainer.threads=1", "tracking.every_steps=1",
            "tracking.mode=disabled", "norm.precise_images=24", "cluster.accelerator=cpu", f"cluster.devices={devices}",
            "trainer.checkpoint_every_steps=1", "trainer.keep_checkpoints=99", "ledger=true",
            *overrides,
        ]  # fmt: skip
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        ended = Ended(process.returncode, errors, time.monotonic() - began, tmp_path / name)
        print(fault, round(ended.seconds, 1), "s:", errors)
        until = time.monotonic() + 10  # W&B's own process looks every 2 s whether the one that began it lives
        while (left := marked(mark)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left
        return ended

    return start


def marked(mark: str) -> list[int]:
    """Processes of a run that are there still."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def keys_of(shards_ledger: Path, step: int) -> list[str]:
    lines = [json.loads(line) for line in shards_ledger.read_text().splitlines()]
    return next(line["keys"] for line in lines if line["step"] == step)


@pytest.fixture(scope="module")
def sound_keys(shards, tmp_path_factory):
    """Keys that rank 1 of 3 has in every step, by the order itself."""
    from pipeline.data.dataset import Location, open_dataset
    from pipeline.data.images import open_images
    from pipeline.data.loader import Batching, sample_names

    dataset = open_dataset(Location(str(shards)), workers=1, say=lambda text: None)
    names = sample_names(open_images(dataset, "train", 5, 0).split, Batching(24, world=3))
    return lambda step, rank=1: names(rank, (step - 1) // 5, (step - 1) % 5)


def check_named(ended: Ended, step: int, keys: list[str], rank: int = 1) -> None:
    assert f"rank {rank} of 3 on {socket.gethostname()}" in ended.line
    assert f"step {step} (epoch {(step - 1) // 5 + 1}" in ended.line
    assert ", ".join(keys[:8]) in ended.line
    assert "Traceback" not in ended.errors
    assert ended.seconds < 60
    assert f"{ended.directory}/logs" in ended.line or f"pipeline train {ended.directory}/config.yaml" in ended.line


HANGS = [
    ("sleep_in_forward:4", 4, "forward", "faults.py:.* in sleep_in_forward"),
    pytest.param("sleep_in_backward:4", 4, "backward", "faults.py:.* in <lambda>", marks=pytest.mark.slow),
    pytest.param("sleep_in_loading:27", 4, "loading", "faults.py:.* in <lambda>", marks=pytest.mark.slow),
]
WATCHED = "cluster.hang_seconds=4"


@pytest.mark.parametrize(("fault", "step", "phase", "line"), HANGS)
def test_a_rank_that_hangs_is_named_and_all_end_resumable(train, sound_keys, fault, step, phase, line):
    ended = train(fault, WATCHED)
    assert ended.code == 75
    check_named(ended, step, sound_keys(step))
    assert phase in ended.line
    assert re.search(line, ended.line)
    assert "rank 0" not in ended.line
    assert "rank 2" not in ended.line
    written = json.loads((ended.directory / "logs" / "failures.jsonl").read_text())
    assert written["ranks"][0]["keys"] == sound_keys(step)
    assert line.partition(":")[0] in (ended.directory / "logs" / "rank-1.log").read_text()
    assert json.loads((ended.directory / "run.json").read_text())["starts"][0]["ended"] == "failed"


@pytest.mark.slow
def test_a_rank_that_holds_pythons_lock_is_named_too(train):
    ended = train("keep_the_lock:4", WATCHED)
    assert ended.code == 75
    assert "rank 1 of 3" in ended.line
    assert "gives no sign of life" in ended.line
    assert "step 4" in ended.line


def test_a_rank_that_dies_is_named_with_its_signal_and_the_run_is_resumable(train, sound_keys):
    ended = train("die:4", "cluster.workers=1")  # whose data workers end as well, and leave nothing to warn of
    assert ended.code == 75
    assert "resource_tracker" not in ended.errors
    check_named(ended, 4, sound_keys(4))
    assert "killed by signal 9 (SIGKILL)" in ended.line
    assert "lower cluster.workers or data.micro_batch_size" in ended.line
    assert "go on from step 3" in ended.line


@pytest.mark.slow
def test_a_rank_that_crashes_is_named_and_the_run_is_not_resumable(train, sound_keys):
    ended = train("segfault:4")
    assert ended.code == 1
    check_named(ended, 4, sound_keys(4))
    assert "killed by signal 11 (SIGSEGV)" in ended.line
    assert "in segfault" in (ended.directory / "logs" / "rank-1.log").read_text()


def test_a_loss_that_is_no_number_is_named_and_poisons_no_checkpoint(train, sound_keys):
    ended = train("no_number:4")
    assert ended.code == 1
    check_named(ended, 4, sound_keys(4))
    assert "loss nan" in ended.line
    assert "rank 0" not in ended.line
    steps = checkpoints(ended.directory / "checkpoints")
    assert steps[-1].name == "step-00000003.ckpt"
    state = torch.load(steps[-1], weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_a_disk_that_is_full_is_named_and_the_run_goes_on_when_there_is_room(train):
    ended = train("full:4", devices=2)
    assert ended.code == 1
    assert f"rank 1 of 2 on {socket.gethostname()}: " in ended.line
    assert "cannot be written (No space left on device); step-00000003.ckpt is the newest checkpoint" in ended.line
    assert f"go on with: pipeline train {ended.directory}/config.yaml" in ended.line
    assert "Traceback" not in ended.errors
    (ended.directory / "ledger" / "rank-1.jsonl").unlink()
    assert train("", devices=2).code == 0


@pytest.mark.slow
def test_a_loss_that_is_no_number_can_be_skipped_and_the_run_ends_well(train):
    ended = train("no_number:4", "trainer.on_nan=skip", "trainer.checkpoint_every_steps=2")
    assert ended.code == 0
    assert "Traceback" not in ended.errors
    line = json.loads((ended.directory / "skipped.jsonl").read_text())
    assert (line["step"], [rank["rank"] for rank in line["ranks"]]) == (4, [1])
    lines = [json.loads(text) for text in (ended.directory / "ledger" / "rank-1.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == list(range(1, 11))
    assert [len(entry["keys"]) for entry in lines] == [8, 8, 8, 0, *[8] * 6]
    again = train("", "trainer.on_nan=skip", "trainer.checkpoint_every_steps=2", "trainer.max_epochs=3")
    assert again.code == 0
    starts = json.loads((ended.directory / "run.json").read_text())["starts"]
    assert [start["ended"] for start in starts] == ["failed", "done", "done"]


@pytest.mark.slow
def test_a_loss_spike_is_skipped_alone_on_one_process(train):
    ended = train("spike:19", "trainer.on_nan=skip", "trainer.spike_factor=10", "trainer.max_epochs=4", devices=1)
    assert ended.code == 0
    line = json.loads((ended.directory / "skipped.jsonl").read_text())
    assert line["step"] == 19
    assert "over 10 times its median" in line["reason"]


@pytest.mark.slow
def test_out_of_memory_says_what_to_lower_in_one_line(train):
    ended = train("fat:3")
    assert ended.code == 1
    assert "rank 1 of 3" in ended.line
    assert "lower data.micro_batch_size (now 8 images on a rank) to 4" in ended.line
    assert "Traceback" not in ended.errors
    assert "Traceback" in (ended.directory / "logs" / "rank-1.log").read_text()


def test_a_slow_step_that_is_healthy_does_not_alarm(train):
    ended = train("slow:4", WATCHED, "trainer.max_steps=5", "trainer.validate_every_epochs=0")
    assert ended.code == 0
    assert not (ended.directory / "logs" / "failures.jsonl").exists()
