"""A run whose shards are staged on the node is the run that reads them where they lie, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.data.directory import Directory
from pipeline.data.shards import read_manifest
from tests.data.test_remote_dataset import limit_of
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_remote_run import SHORT, assert_same, ledgers
from tests.multiprocess.test_resume import config, train_rank

pytestmark = pytest.mark.timeout(120)


def counted_rank(rank: int, world: int, settings: Config, stop_at: int, place: Path) -> bool:
    """Train on a node whose disk a variable names, and note each copy that this process begins."""
    os.environ["JOB_DISK"] = str(place / "disk")  # of which the server that forks ranks knows nothing
    opened = Directory.open

    def noted(self, name, start=0, stop=None):
        with (place / "log").open("a") as file:
            file.write(f"{name} {start}\n")
        return opened(self, name, start, stop)

    Directory.open = noted  # type: ignore[method-assign]
    return train_rank(rank, world, settings, stop_at)


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two ranks that read where the shards lie, two epochs."""
    settings = config(shards, tmp_path_factory.mktemp("plain"), "plain", 2, *SHORT)
    assert run_ranks(2, train_rank, settings, 0) == [False, False]
    return settings


def all_shards(root: Path) -> list[str]:
    return sorted(entry.shard for entries in read_manifest(root).splits.values() for entry in entries)


def test_two_staged_ranks_are_those_of_the_plain_run_and_copy_each_shard_once(shards, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_DISK", str(tmp_path / "disk"))
    staged = ["data.stage=true", "data.cache=$JOB_DISK/pipeline"]
    settings = config(shards, tmp_path, "staged", 2, *SHORT, *staged)
    assert settings.data.cache == "$JOB_DISK/pipeline"
    assert run_ranks(2, counted_rank, settings, 0, tmp_path) == [False, False]
    assert_same(settings, plain)
    assert sorted((tmp_path / "log").read_text().splitlines()) == [f"{name} 0" for name in all_shards(shards)]


def test_a_run_goes_on_staged_or_not_as_the_same_run(shards, plain, tmp_path):
    staged = ["data.stage=true", f"data.cache={tmp_path / 'disk'}", f"data.cache_gb={limit_of(shards, 1) / 1e9:.10f}"]
    assert run_ranks(2, train_rank, config(shards, tmp_path, "broken", 2, *SHORT), 3) == [True, True]
    on_disk = config(shards, tmp_path, "broken", 2, *SHORT, *staged)
    assert run_ranks(2, train_rank, on_disk, 7) == [True, True]
    again = config(shards, tmp_path, "broken", 2, *SHORT)
    assert run_ranks(2, train_rank, again, 0) == [False, False]
    assert_same(again, plain)


def test_launched_ranks_go_on_without_a_disk_to_stage_to_and_say_so_once(shards, plain, tmp_path):
    (tmp_path / "disk").write_text("a file")
    words = ["recipe=bn_x5", "data=folder", f"data.root={shards}", f"run.dir={tmp_path}", "run.id=cli",
             "data.image_size=16", "model.stem=small", "model.width=0.125", "data.global_batch_size=24",
             "norm.precise_images=48", "cluster.accelerator=cpu", "tracking.mode=disabled", *SHORT,
             "cluster.devices=2", "cluster.workers=1", "ledger=true", "data.stage=true",
             f"data.cache={tmp_path}/disk"]  # fmt: skip
    command = [sys.executable, "-m", "pipeline", "train", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert ledgers(tmp_path / "cli") == ledgers(plain.directory)
    said = done.stdout + done.stderr
    assert f"staging {shards}: 7 shards, 0.000625 GB, 0 GB of it here already; {tmp_path}/disk/shards keeps" in said
    assert said.count(f"{tmp_path}/disk/shards cannot be written (Not a directory)") == 1
    assert said.count("not staged, but read where it lies") == 1
