"""Whatever the newest checkpoint has become: one line says it, nothing is lost, and the run ends with the same bits."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import cli
from pipeline.benchmarks.chaos import differences
from pipeline.training.checkpoint_io import STAMP


class Malicious:
    """Runs a command where a pickle of it is loaded with trust."""

    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside each other: a run of two epochs, the same one after its first, and one of another model."""
    root = tmp_path_factory.mktemp("runs")
    train = ["train", "recipe=bn_x5", "data=folder", f"data.root={shards}", f"run.dir={root}", "data.image_size=16",
             "model.stem=small", "data.global_batch_size=24", "trainer.threads=1", "tracking.every_steps=1",
             "tracking.mode=disabled", "norm.precise_images=24", "cluster.accelerator=cpu", "cluster.devices=1",
             "trainer.checkpoint_every_steps=4", "trainer.keep_checkpoints=1", "ledger=true"]  # fmt: skip
    for name, epochs, width in (("whole", 2, 0.0625), ("half", 1, 0.0625), ("other", 1, 0.125)):
        words = [f"run.id={name}", f"trainer.max_epochs={epochs}", f"model.width={width}"]
        assert cli.main([*train, *words, "trainer.keep_checkpoints=9"]) == 0
    return root


def tear(path: Path, runs: Path) -> None:
    os.truncate(path, 30_000)


def exchange(path: Path, runs: Path) -> None:
    shutil.copy(runs / "other" / "checkpoints" / path.name, path)


def poison(path: Path, runs: Path) -> None:
    torch.save({"state_dict": {}, STAMP: {"format": 1}, "more": Malicious()}, path)


FAULTS = {
    tear: "torn or damaged (File is not a zip file)",
    exchange: "of another run (model.width = 0.125, here 0.0625)",
    poison: "holds more than tensors and plain values, and is not loaded",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_one_before_is_gone_on_from_and_the_bits_are_the_same(runs, tmp_path, capsys, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "half", tmp_path / "half")
    newest = Path("half/checkpoints/step-00000005.ckpt")
    fault(newest, runs)
    content = newest.read_bytes()
    # keep_checkpoints=1: the file that is passed over must not push out the only good one
    assert cli.main(["train", "half/config.yaml", "trainer.max_epochs=2", "trainer.keep_checkpoints=1"]) == 0
    printed = capsys.readouterr()
    assert f"WARNING: {newest} is passed over, and now called {newest.name}.set-aside: {FAULTS[fault]}" in printed.out
    assert "going on from half/checkpoints/step-00000004.ckpt" in printed.out
    assert "Traceback" not in printed.out + printed.err
    assert differences(runs / "whole", tmp_path / "half", 1) == []
    assert newest.with_name(f"{newest.name}.set-aside").read_bytes() == content
    assert not Path("owned").exists()


def test_one_of_a_newer_version_is_refused_and_nothing_is_touched(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "half", tmp_path / "half")
    newest = Path("half/checkpoints/step-00000005.ckpt")
    content = torch.load(newest, weights_only=True)
    content[STAMP]["format"] = 2
    torch.save(content, newest)
    before = {path: path.read_bytes() for path in Path("half/checkpoints").iterdir()}
    assert cli.main(["train", "half/config.yaml", "trainer.max_epochs=2"]) == 1
    assert capsys.readouterr().err == (
        f"pipeline: {newest} has format 2, this version reads up to 1; go on with the newer version that wrote it\n"
    )
    assert {path: path.read_bytes() for path in Path("half/checkpoints").iterdir()} == before
