"""`make demo` as its user has it: two processes, the recipe as written, population statistics."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.callbacks.journal import read_journal

PIPELINE = [sys.executable, "-m", "pipeline"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_reaches_97_percent_and_leaves_a_segment_that_wandb_reads(tmp_path):
    words = ["train", "recipe=bn_x5", "data=digits", "cluster.devices=2", "run.id=demo", "cluster.accelerator=cpu"]
    done = subprocess.run([*PIPELINE, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "runs" / "demo"
    assert "runs/demo" in done.stdout
    last = [row for row in read_journal(directory / "metrics.csv") if row.split == "val"][-1]
    assert last.images == 360
    assert last.top1 >= 0.97
    (segment,) = directory.glob("wandb/offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    history = subprocess.run(
        [wandb, "leet", "inspect", "--json", segment], capture_output=True, text=True, check=True
    ).stdout
    assert "val/top1" in history
    evaluated = subprocess.run(
        [*PIPELINE, "evaluate", "runs/demo", "cluster.devices=3"], cwd=tmp_path, capture_output=True, check=False
    )
    assert evaluated.returncode == 0
    result = json.loads((directory / "evaluation.json").read_text())
    assert result["images"] == 360  # each once, on three processes as on two
    assert abs(result["top1"] - last.top1) < 0.02


def start(directory: Path, *words: str) -> subprocess.Popen:
    command = [*PIPELINE, "train", "recipe=bn_x5", "data=digits", "run.id=a", "cluster.accelerator=cpu", *words]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_leaves_with_75_and_says_how_to_go_on(tmp_path, processes):
    import signal

    words = [f"cluster.devices={processes}", "tracking.every_steps=1", "norm.precise_images=64", "trainer.max_epochs=1"]
    run = start(tmp_path, *words)
    journal = tmp_path / "runs" / "a" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not journal.exists() or len(read_journal(journal)) < 3:
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 75, errors
    assert "its checkpoint is written; go on with: pipeline train runs/a/config.yaml" in errors
    assert "Traceback" not in errors
    again = subprocess.run(
        [*PIPELINE, "train", "runs/a/config.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "going on from runs/a/checkpoints/step-" in again.stdout
    assert [row.step for row in read_journal(journal) if row.split == "train"] == list(range(1, 45))
    segments = list((tmp_path / "runs" / "a" / "wandb").glob("offline-run-*"))
    assert len({segment.name.rpartition("-")[2] for segment in segments}) == 1  # one W&B run
