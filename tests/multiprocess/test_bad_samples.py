"""Bad samples in a real run: replaced, written down, and too many of them stop all ranks together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline import run
from pipeline.callbacks.journal import read_journal
from pipeline.config import Config
from pipeline.data.shards import DataError, read_index
from pipeline.training.checkpoint import checkpoints
from pipeline.world import World
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config, final

SHARD = "train-000002.tar"


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """Two images of one shard with a flipped bit each."""
    copy = Path(shutil.copytree(shards, tmp_path / "damaged"))
    index, content = read_index(copy / SHARD), bytearray((copy / SHARD).read_bytes())
    for number in (4, 9):
        content[index.offset[number] + index.length[number] // 2] ^= 1
    (copy / SHARD).write_bytes(content)
    return copy


def train_rank(rank: int, world: int, settings: Config) -> str:
    """Train; what ended it."""
    try:
        run.train(settings, World.from_environment(), Console(quiet=True))
    except DataError as error:
        return str(error)
    return "done"


def noted(directory: Path) -> list[dict]:
    lines = [
        json.loads(line)
        for path in directory.glob("bad-samples/rank-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return sorted(lines, key=lambda line: (line["step"], line["sample"]))


def test_bad_samples_are_replaced_and_written_down_on_any_ranks(damaged, tmp_path):
    journals, notes = [], []
    for world in (1, 2):
        settings = config(damaged, tmp_path, f"w{world}", world, "data.bad_samples=0.02", "trainer.precision=64")
        assert run_ranks(world, train_rank, settings) == ["done"] * world
        journals.append([row.loss for row in read_journal(settings.directory / "metrics.csv")])
        notes.append(noted(settings.directory))
    assert notes[0] == notes[1]
    assert journals[0] == pytest.approx(journals[1], abs=1e-9)
    index = read_index(damaged / SHARD)
    assert {line["key"] for line in notes[0]} <= {index.key[4], index.key[9]}
    assert 4 <= len(notes[0]) <= 6  # three epochs, of which each leaves out 10 of 130
    for line in notes[0]:
        assert (line["split"], line["shard"], line["reason"]) == (
            "train", SHARD, "its bytes are not those that were indexed")  # fmt: skip
        assert line["offset"] in index.offset
        assert 60 <= line["substitute"] < 90
        assert line["epoch"] == (line["step"] - 1) // 5


def test_too_many_bad_samples_stop_all_ranks_with_a_checkpoint_from_which_the_run_goes_on(damaged, tmp_path):
    whole = config(damaged, tmp_path, "whole", 2, "data.bad_samples=0.02")
    run_ranks(2, train_rank, whole)
    strict = config(damaged, tmp_path, "strict", 2, "data.bad_samples=0.01")  # 1 of 130 may be bad
    ended = run_ranks(2, train_rank, strict)
    assert ended[0] == ended[1]
    assert "2 of 130 training (epoch 1) images cannot be used, data.bad_samples = 0.01 allows 1" in ended[0]
    assert str(strict.directory / "bad-samples") in ended[0]
    stopped = final(strict.directory)["global_step"]
    assert 0 < stopped < 15
    again = config(damaged, tmp_path, "strict", 2, "data.bad_samples=0.02")
    assert run_ranks(2, train_rank, again) == ["done"] * 2
    left, right = final(whole.directory), final(again.directory)
    assert left["global_step"] == right["global_step"] == 15
    assert all(torch.equal(value, right["state_dict"][name]) for name, value in left["state_dict"].items())
    assert noted(again.directory) == noted(whole.directory)
    assert checkpoints(again.directory / "checkpoints")
