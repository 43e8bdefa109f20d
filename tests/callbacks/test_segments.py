import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.callbacks.segments import Segment, last_position, position, position_of, segments


def records(path: Path) -> list[dict]:
    """A segment, as W&B's own reader sees it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return [json.loads(line) for line in lines]


def inspected(path: Path) -> list[dict]:
    """The history alone, without W&B's own values."""
    rows = [record["history"]["item"] for record in records(path) if record["type"] == "history"]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """A segment of several blocks, as W&B writes it."""
    import wandb

    directory = tmp_path_factory.mktemp("written")
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(id="many", mode="offline", dir=str(directory), settings=settings)
    for step in range(1, 401):
        run.log({"step": step, "train/loss": 1 / step, "epoch": step / 7}, step=2 * step, commit=True)
    run.finish()
    wandb.teardown()
    (segment,) = segments(directory, "many")
    assert segment.is_offline
    return segment.path.read_bytes()


@pytest.mark.parametrize("damage", ["none", "cut", "cut in the header", "zeros", "flipped"])
def test_what_is_read_is_what_wandbs_own_reader_reads(written, tmp_path, damage):
    data = bytearray(written)
    assert len(data) > 3 * 32768
    match damage:
        case "cut":
            del data[random.Random(0).randrange(40_000, 80_000) :]
        case "cut in the header":
            del data[7 + 3 :]
        case "zeros":
            data[50_000:50_300] = bytes(300)
        case "flipped":
            data[70_000] ^= 1
    path = tmp_path / "run-many.wandb"
    path.write_bytes(data)
    rows = Segment(path).rows()
    assert rows == inspected(path)
    assert (len(rows) == 400) == (damage == "none")


def test_a_segment_that_was_not_flushed_holds_no_row(tmp_path):
    path = tmp_path / "run-none.wandb"
    for data in (b"", b":W&B", b":W&B\xe1\xbe\x00", b"something else"):
        path.write_bytes(data)
        assert Segment(path).rows() == []


def test_positions_grow_along_the_journal():
    rows = [(10, "train"), (20, "train"), (20, "val"), (21, "train"), (21, "val")]
    positions = [position(*row) for row in rows]
    assert positions == sorted(set(positions))
    assert positions == [position_of({"step": step, f"{split}/loss": 1.0}) for step, split in rows]


def test_segments_come_in_the_order_of_their_start_online_or_offline(tmp_path, written):
    names = ["run-20260102_000000-x", "offline-run-20260101_000000-x", "offline-run-20260103_000000-x",
             "offline-run-20260101_000000-other"]  # fmt: skip
    for name in names:
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / f"run-{name.rpartition('-')[2]}.wandb").write_bytes(written)
    (tmp_path / "wandb" / "latest-run").symlink_to(tmp_path / "wandb" / names[2])
    assert [each.name for each in segments(tmp_path, "x")] == [names[1], names[0], names[2]]
    assert last_position(tmp_path, "x") == 800
    assert last_position(tmp_path, "unknown") == -1
