"""A run that streams over HTTP is the run on the local data set, in real processes; and what the command line says."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.callbacks.preemption import Preemption
from pipeline.config import Config
from tests.data.faulty_server import Fault, FaultyServer, faulty_server
from tests.data.test_dataset import timm_tree
from tests.data.test_remote_dataset import SHARD, Watch, limit_of, opened, other_shards, put, tars
from tests.multiprocess.ranks import run_ranks
from tests.multiprocess.test_resume import config, final, journal, train_rank
from tests.test_cli import refused

pytestmark = pytest.mark.timeout(120)
SHORT = ["data.window=1", "trainer.max_epochs=2"]


@pytest.fixture
def server(shards: Path) -> Iterator[FaultyServer]:
    with faulty_server() as server:
        put(server, shards)
        yield server


def ledgers(directory: Path) -> list[str]:
    return [(directory / "ledger" / f"rank-{rank}.jsonl").read_text() for rank in range(2)]


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two ranks on the local data set, two epochs."""
    settings = config(shards, tmp_path_factory.mktemp("local"), "local", 2, *SHORT)
    assert run_ranks(2, train_rank, settings, 0) == [False, False]
    return settings


def over_http(server: FaultyServer, directory: Path, name: str, *more: str) -> Config:
    return config(f"{server.url}/set", directory, name, 2, *SHORT, f"data.cache={directory / 'cache'}", *more)


def assert_same(run: Config, other: Config) -> None:
    assert ledgers(run.directory) == ledgers(other.directory)
    assert journal(run.directory) == journal(other.directory)
    left, right = final(run.directory), final(other.directory)
    assert left["global_step"] == right["global_step"] == 10
    assert all(torch.equal(value, right["state_dict"][name]) for name, value in left["state_dict"].items())


def test_two_ranks_over_http_are_those_of_the_local_run_and_fetch_each_shard_once(server, local, tmp_path):
    for name in tars(server):  # slow enough for both ranks to want it at once
        server.fail(name, Fault(pace=0.1), forever=True)
    settings = over_http(server, tmp_path, "http")
    assert run_ranks(2, train_rank, settings, 0) == [False, False]
    assert_same(settings, local)
    for name in tars(server):
        assert [request.start for request in server.gets(name)] == [0], name
        assert server.sent(name) == len(server.files[name])


def test_an_interrupted_run_over_http_goes_on_as_the_same_run(server, local, tmp_path):
    assert run_ranks(2, train_rank, over_http(server, tmp_path, "broken"), 3) == [True, True]
    server.fail(SHARD, Fault(status=500), Fault(cut=60_000), Fault(delay=0.3))
    again = over_http(server, tmp_path, "broken")
    assert run_ranks(2, train_rank, again, 0) == [False, False]
    assert_same(again, local)


def words_of(server: FaultyServer, directory: Path, *more: str) -> list[str]:
    return ["data=folder", f"data.root={server.url}/set", f"data.cache={directory / 'cache'}", f"run.dir={directory}",
            "data.image_size=16", "model.stem=small", "model.width=0.125", "data.global_batch_size=24", "run.id=cli",
            "norm.precise_images=48", "cluster.accelerator=cpu", "tracking.mode=disabled", *SHORT, *more]  # fmt: skip


def pipeline(directory: Path, *words: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=seconds, check=False)


def test_launched_ranks_with_workers_stay_within_a_cache_of_two_windows(server, shards, local, tmp_path):
    limit = limit_of(shards, 1)
    watched = opened(server, tmp_path / "cache")
    small = ["cluster.devices=2", "cluster.workers=1", "ledger=true", f"data.cache_gb={limit / 1e9:.10f}"]
    with Watch(watched) as watch:
        done = pipeline(tmp_path, "train", "recipe=bn_x5", *words_of(server, tmp_path, *small))
    assert done.returncode == 0, done.stderr
    assert 0 < watch.most <= limit
    assert ledgers(tmp_path / "cli") == ledgers(local.directory)
    assert f"streaming {server.url}/set: 7 shards, 0.000625 GB, 0 GB of it here already" in done.stdout


def test_a_shard_lost_in_the_middle_ends_all_launched_ranks_in_one_line(server, tmp_path):
    server.fail(SHARD, Fault(status=404), forever=True)
    began = time.monotonic()
    done = pipeline(tmp_path, "train", *words_of(server, tmp_path, "cluster.devices=2", "cluster.workers=1"))
    assert done.returncode == 3
    line = f"pipeline: {server.url}{SHARD}: not found (404); check the name, or bring the file back"
    assert [text for text in done.stderr.splitlines() if "pipeline:" in text] == [line]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 40


def test_a_cache_that_is_too_small_is_refused_before_there_is_a_run(server, tmp_path, capsys):
    line = refused(capsys, 3, "train", *words_of(server, tmp_path, "data.cache_gb=0.0002", "cluster.devices=2"))
    assert line == (
        "pipeline: data.cache_gb = 0.0002 is less than two windows of shards, 0.000226 (a window is 1 of 5 shards): "
        "each would be fetched again and again; set data.cache_gb=0.000226 or, in a new run, data.window=1 with "
        "data.cache_gb=0.000226"
    )
    assert not (tmp_path / "cli").exists()


def test_a_changed_set_is_refused_by_the_command_that_goes_on(server, tmp_path, capsys, monkeypatch):
    directory = interrupted(server, tmp_path, monkeypatch)
    capsys.readouterr()
    put(server, other_shards(tmp_path / "other"))
    line = refused(capsys, 3, "train", str(directory / "config.yaml"))
    assert f"data.root = {server.url}/set holds another data set than this run began with (train-00000" in line


def interrupted(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one process that a signal has ended after its second step."""
    from pipeline import cli

    noticed = Preemption.on_train_batch_end

    def interrupt(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        noticed(self, trainer, pl_module, outputs, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "on_train_batch_end", interrupt)
        assert cli.main(["train", *words_of(server, tmp_path)]) == 75
    return tmp_path / "cli"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("root", "code", "message"),
    [
        ("http://127.0.0.1:{closed}/set", 3, "/set/dataset.json: connection refused (3 attempts in all); check the"),
        ("http://no-such-host.invalid/set", 3, "/dataset.json: the host's name is not known (3 attempts in all);"),
        ("{url}/nowhere", 3, "/nowhere holds neither dataset.json nor _info.json, and HTTP has no listing; check the"),
        ("{url}/secret", 3, "/secret/dataset.json: access refused; HTTP is read without credentials: make the file"),
        ("ftp://host/set", 3, "ftp: is not read, nor is any URL handed to a shell; http(s)://, s3:// and gs://"),
        ('"pipe:curl -H hunter2 https://h/a"', 3, "pipe: is not read, nor is any URL handed to a shell;"),
        ("http://user:hunter2@127.0.0.1:{closed}/set", 3, "http://... holds credentials, which would end up in logs;"),
        ('"https://host/set?X-Amz-Signature=hunter2"', 3, "https://... holds credentials, which would end up in logs"),
        ("https://host/set?X-Amz-Signature=hunter2", 2, "the value of data.root cannot be read; put quotes around"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["train", "shards describe"])
def test_a_root_that_cannot_be_read_is_one_line_within_seconds_and_no_secret(
    server, tmp_path, capsys, verb, root, code, message
):
    server.fail("/secret/dataset.json", Fault(status=403), forever=True)
    root = root.format(url=server.url, closed=closed_port())
    began = time.monotonic()
    if verb == "train":
        words = [word for word in words_of(server, tmp_path) if "data.root" not in word]
        line = refused(capsys, code, "train", *words, f"data.root={root}")
    else:
        root, code = root.strip('"'), 3
        message = message if "cannot be read" not in message else "holds credentials"
        line = refused(capsys, code, "shards", "describe", root, "--cache", str(tmp_path / "cache"))
    assert message in line
    assert "hunter2" not in line
    assert time.monotonic() - began < 10
    assert not (tmp_path / "cli").exists()


def test_shards_verbs_read_over_http(server, tmp_path, capsys, monkeypatch):
    from pipeline import cli

    monkeypatch.chdir(tmp_path)
    cache = ["--cache", "cache"]
    assert cli.main(["shards", "describe", f"{server.url}/set", *cache]) == 0
    assert "5 classes: class0, class1" in capsys.readouterr().out
    assert Path("set-train.png").is_file()
    assert cli.main(["shards", "verify", f"{server.url}/set", "--decode", *cache]) == 0
    assert f"{server.url}/set: 165 images in 7 shards, 0.6 MB: sound" in capsys.readouterr().out
    assert cli.main(["shards", "index", f"{server.url}/set", *cache]) == 0
    assert f"{server.url}/set: train: 130 images in 5 shards" in capsys.readouterr().out

    put(server, timm_tree(tmp_path / "others", info=False))
    patterns = ["--train", "imagenet1k-train-{0000..0002}.tar", "--val", "imagenet1k-validation-00.tar"]
    assert cli.main(["shards", "index", f"{server.url}/set", *patterns, *cache]) == 0
    output = capsys.readouterr().out
    assert f"indexing 4 shards of {server.url}/set into cache/indexes/" in output
    assert f"{server.url}/set: val: 7 images in 1 shards" in output
    server.fail("/set/imagenet1k-train-0001.tar", Fault(content=b"\0" * 71680), forever=True)
    line = refused(capsys, 3, "shards", "index", f"{server.url}/set", *patterns, *cache)
    assert "imagenet1k-train-0001.tar" in line
    for child in multiprocessing.active_children():  # which ends the shard that it has begun
        child.join(20)
