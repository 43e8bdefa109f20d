"""The doctor: every planted fault is found with its way out, a healthy run has none, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import wandb
from torch.optim.optimizer import register_optimizer_step_post_hook

from pipeline import cli
from pipeline.cli.settling import settled
from pipeline.config import Config, completed, compose_config, identity
from pipeline.data.shards import file_sha256, index_path, read_index, read_manifest, write_manifest
from pipeline.data.split import table_path
from pipeline.doctor import (
    arithmetic,
    directory,
    examination,
    machine,
    network,
    pace,
    packed,
    presence,
    slurm,
    versions,
)
from pipeline.doctor.composition import compose
from pipeline.doctor.findings import guarded, ok
from pipeline.launch.lock import LOCK, this_process
from pipeline.launch.patience import within
from pipeline.launch.plan import RECORD, STARTED, close_run, open_run
from pipeline.launch.queue import QueueError
from pipeline.run.assembly import build_model
from pipeline.training.checkpoint_io import write_checkpoint
from pipeline.training.schedule import Schedule
from tests.callbacks.wandb_server import KEY, WandbServer
from tests.data.faulty_server import Fault, faulty_server

SMALL = ("data=folder", "data.global_batch_size=24", "data.image_size=16", "model.stem=small", "model.width=0.125",
         "cluster.accelerator=cpu", "trainer.max_epochs=2", "trainer.threads=1")  # fmt: skip

GROWING = ("augment.first_size=0.5", "augment.growth_epochs=2")

MEASURED = pace.measured


@dataclass
class Patient:
    """A run in a directory of its own, on a copy of the shards. words: what is typed besides SMALL."""

    shards: Path
    patch: pytest.MonkeyPatch
    words: tuple[str, ...] = ()

    def examined(self, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
        code = cli.main(["doctor", "--json", *SMALL, f"data.root={self.shards}", *self.words])
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert report["exit_code"] == code
        return report

    def begun(self, *words: str) -> Config:
        """A run `mine` that has begun."""
        config = open_run(settled(compose_config([*SMALL, f"data.root={self.shards}", "run.id=mine", *words])))
        (config.directory / STARTED).touch()
        self.words = ("run.id=mine",)
        return config

    def checkpoint(self, config: Config, step: int) -> Path:
        path = config.directory / "checkpoints" / f"step-{step:08d}.ckpt"
        write_checkpoint({"state_dict": {"w": torch.ones(2000)}}, path, identity(config))
        return path


@pytest.fixture
def patient(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(pace, "measured", lambda step, most, budget: pace.Pace(most, 0.1, 5))
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no Slurm, whatever this machine has
    wandb.teardown()  # which keeps the server's address of an earlier test
    return Patient(Path(shutil.copytree(shards, tmp_path / "shards")), monkeypatch)


def weights_that_do_not_fit(p: Patient) -> None:
    torch.save({"stem.0.conv.weight": torch.zeros(4, 3, 3, 3)}, "weights.pth")
    p.words = ("model.init=weights.pth",)


def weights_that_are_not_there(p: Patient) -> None:
    p.words = ("recipe=fine_tune",)


def no_validation_images(p: Patient) -> None:
    whole = read_manifest(p.shards)
    write_manifest(p.shards, whole.classes, {"train": whole.splits["train"]}, whole.samples, whole.plan)


def missing_shard(p: Patient) -> None:
    (p.shards / "train-000001.tar").unlink()


def truncated_shard(p: Patient) -> None:
    os.truncate(p.shards / "train-000001.tar", 5000)


def flipped_byte(p: Patient) -> None:
    path = p.shards / "val-000000.tar"
    content = bytearray(path.read_bytes())
    content[read_index(path).offset[0] + 20] ^= 1
    path.write_bytes(content)


def damaged_manifest(p: Patient) -> None:
    path = p.shards / "dataset.json"
    path.write_text(path.read_text().replace('"count":30', '"count":31', 1))


def table_of_another_set(p: Patient) -> None:
    shutil.copy(table_path(p.shards, "val"), table_path(p.shards, "train"))


def wrong_index(p: Patient) -> None:
    shutil.copy(index_path(p.shards / "train-000000.tar"), index_path(p.shards / "train-000001.tar"))


def file_in_the_way(p: Patient) -> None:
    Path("occupied").write_text("a file, whose mode root cannot ignore")
    p.words = ("run.dir=occupied/runs",)


def full_disk(p: Patient) -> None:
    real = os.statvfs
    tight = SimpleNamespace(f_bavail=1000, f_frsize=4096, f_files=0, f_favail=0, f_blocks=1000)
    p.patch.setattr(os, "statvfs", lambda path: real(path) if "shm" in str(path) else tight)


def small_shared_memory(p: Patient) -> None:
    real = os.statvfs
    small = SimpleNamespace(f_blocks=16384, f_frsize=4096, f_bavail=16384, f_files=0, f_favail=0)
    p.patch.setattr(os, "statvfs", lambda path: small if "shm" in str(path) else real(path))
    p.words = ("cluster.workers=8", "cluster.devices=2", "data.image_size=224")


def held_lock(p: Patient) -> None:
    config = p.begun()
    (config.directory / LOCK).write_text(json.dumps(asdict(this_process())))


def torn_checkpoint(p: Patient) -> None:
    config = p.begun()
    p.checkpoint(config, 5)
    os.truncate(p.checkpoint(config, 10), 3000)


def every_checkpoint_torn(p: Patient) -> None:
    os.truncate(p.checkpoint(p.begun(), 10), 3000)


def another_identity(p: Patient) -> None:
    p.begun()
    p.words = ("run.id=mine", "optimizer.rate=0.5")


def crash_loop(p: Patient) -> None:
    for _ in range(5):
        close_run(p.begun().directory, "failed")


def other_files(p: Patient) -> None:
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/thesis.txt").write_text("precious")
    p.words = ("run.id=mine",)


def unreadable_record(p: Patient) -> None:
    (p.begun().directory / RECORD).write_text("{")


def no_server(p: Patient) -> None:
    p.patch.setenv("WANDB_API_KEY", KEY)
    p.patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    p.words = ("tracking.mode=online",)


def malicious_lightning(p: Patient) -> None:
    real = versions.metadata.version
    p.patch.setattr(versions.metadata, "version", lambda name: "2.6.3" if name == "lightning" else real(name))


def old_torch(p: Patient) -> None:
    real = versions.metadata.version
    p.patch.setattr(versions.metadata, "version", lambda name: "2.10.0+cu128" if name == "torch" else real(name))
    p.patch.setattr(versions.metadata, "requires", lambda name: ["torch>=2.11", 'pytest>=99; extra == "dev"'])


def unresolved_host(p: Patient) -> None:
    def nowhere(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    p.patch.setattr(network.check_host, "__defaults__", (nowhere, 4.0, ""))


def temporary_directory_gone(p: Patient) -> None:
    p.patch.setenv("TMPDIR", "/nowhere")


def typed(*words: str) -> Callable[[Patient], None]:
    def plant(p: Patient) -> None:
        p.words = words

    return plant


PLANTED = [
    # what is planted, exit code, state, what is said, and the way out
    (typed("recipe=bn_x6"), 2, "fault", "recipe = 'bn_x6' is not offered", "did you mean bn_x5?"),
    (typed("trainer.max_epoch=3"), 2, "fault", "trainer.max_epoch is not a key", "did you mean trainer.max_epochs?"),
    (typed("model.name=resnet81"), 2, "fault", "model.name = 'resnet81' is not a model", "did you mean 'resnet18'"),
    (typed("cluster.devices=4", "norm.group_size=3"), 2, "fault", "group_size = 3 does not divide", "[1, 2, 4], or 0"),
    (typed("data.global_batch_size=500"), 2, "fault", "exceeds the 130 training images", "lower it to 130"),
    (typed("data.global_batch_size=2", "cluster.devices=4"), 0, "warning", "2 of 4 ranks get none", "at most 2 ranks"),
    (typed("cluster.devices=8", "norm.group_size=1"), 0, "warning", "fewer than 16", "norm.group_size=0"),
    (typed("data.num_classes=3"), 3, "fault", "lies outside the 3 classes", "check data.num_classes"),
    (typed("data.root=nowhere"), 3, "fault", "data.root = nowhere does not exist", "pipeline shards write SOURCE"),
    (typed("cluster.accelerator=cuda", "cluster.devices=4"), 2, "fault", "cluster.devices = 4, and", "nvidia-smi"),
    (typed("tracking.mode=online"), 2, "fault", "tracking.mode = online, and there is no key", "set WANDB_API_KEY"),
    (weights_that_do_not_fit, 2, "fault", "does not fit bn_inception as it is configured", "set model.* as the file"),
    (weights_that_are_not_there, 2, "fault", "model.init = WEIGHTS is no file", "give the .safetensors"),
    (typed(*GROWING, "model.name=vit_b_32", "data.image_size=224"), 2, "fault",
     "augment.first_size = 0.5: vit_b_32 takes no images of 112 pixels a side", "begin larger, or set it to 1 for 224"),
    (no_validation_images, 3, "fault", "has no split 'val'", "--holdout 0.1"),
    (typed("data.source=digits", "data.root=/proc/none"), 3, "fault", "/proc/none cannot be made", "give a"),
    (missing_shard, 3, "fault", "lacks train-000001.tar", "bring the shards back"),
    (truncated_shard, 3, "fault", "train-000001.tar has 5000 bytes", "pipeline shards verify"),
    (flipped_byte, 3, "fault", "1 of 165 images read are damaged", "bring sound copies"),
    (damaged_manifest, 3, "fault", "dataset.json: damaged", "write the shards again"),
    (table_of_another_set, 3, "fault", "train.samples.npy: damaged, or of another", "pipeline shards index"),
    (wrong_index, 0, "warning", "the index of train-000001.tar is that of another", "bring sound copies"),
    (file_in_the_way, 2, "fault", "cannot be written: Not a directory", "choose a directory that can be written"),
    (full_disk, 2, "fault", "0.0041 GB free", "make room, choose another run.dir"),
    (small_shared_memory, 2, "fault", "/dev/shm has 67.1 MB", "--shm-size=8g"),
    (held_lock, 2, "fault", "belongs to a run that is going on: process", "wait for it or stop it"),
    (torn_checkpoint, 0, "warning", "step-00000010.ckpt is torn or damaged", "goes on from step-00000005.ckpt"),
    (every_checkpoint_torn, 2, "fault", "holds 1 checkpoints and none to go on from", "remove them and start again"),
    (another_identity, 2, "fault", "optimizer.rate = 0.5, the run has 0.0075", "choose a new run.id"),
    (crash_loop, 2, "fault", "failed 5 times in a row after step 0", "run.stalled_starts=0"),
    (other_files, 2, "fault", "holds no run but other files", "choose another run.id"),
    (unreadable_record, 2, "fault", "run.json", "it is needed to go on in the same W&B run"),
    (no_server, 2, "fault", "the server cannot be had (http://127.0.0.1:9 does not answer", "see WANDB_BASE_URL"),
    (malicious_lightning, 2, "fault", "lightning 2.6.3 is malicious (GHSA-w37p-236h-pfx3)", "uninstall it"),
    (old_torch, 2, "fault", "torch 2.10.0+cu128 is installed, torch>=2.11 is required", "pip install 'torch>=2.11'"),
    (unresolved_host, 0, "warning", "does not resolve", "add it to /etc/hosts"),
    (temporary_directory_gone, 2, "fault", "TMPDIR = /nowhere: No such file", "set TMPDIR"),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "code", "state", "said", "way_out"), PLANTED, ids=[case[3] for case in PLANTED])
def test_a_planted_fault_is_found_with_its_way_out(plant, code, state, said, way_out, patient, capsys):
    plant(patient)
    report = patient.examined(capsys)
    found = [f for f in report["findings"] if f["state"] == state and said in f["text"] and way_out in f["way_out"]]
    assert found, [f for f in report["findings"] if f["state"] != "ok"]
    assert report["exit_code"] == code
    assert [f for f in report["findings"] if f["state"] == "fault" and not f["way_out"]] == []
    assert "the check itself failed" not in json.dumps(report)
    assert KEY not in json.dumps(report)


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_a_healthy_run_has_no_fault_and_nothing_is_left_behind(patient, capsys, tmp_path):
    patient.patch.setattr(pace, "measured", MEASURED)
    patient.patch.setattr(examination, "PACE_SECONDS", 0.05)
    before = files(tmp_path)
    report = patient.examined(capsys)
    assert [f for f in report["findings"] if f["state"] == "fault"] == []
    assert (report["verdict"], report["exit_code"], report["schema"]) == ("go", 0, 1)
    assert sum(report["counts"].values()) == len(report["findings"]) > 25
    assert {f["section"] for f in report["findings"]} == {
        "versions", "config", "data", "arithmetic", "directory", "tracking", "machine", "pace"
    }  # fmt: skip
    assert files(tmp_path) == before


def test_digits_need_not_be_packed_to_be_judged(patient, capsys, tmp_path):
    assert cli.main(["doctor", "--json", "recipe=smoke", "data=digits", "cluster.accelerator=cpu"]) == 0
    texts = [f["text"] for f in json.loads(capsys.readouterr().out)["findings"]]
    assert "bn_inception, 641,770 parameters" in texts  # the digits' ten classes are known
    assert any("1,437 train, 360 val images in 10 classes" in text for text in texts)
    assert any("44 steps an epoch, 8 steps and 256 images in all" in text for text in texts)
    assert not (tmp_path / "shards" / "digits").exists()


def test_a_run_that_has_begun_is_judged_by_its_own_config(patient, capsys):
    config = patient.begun()
    patient.checkpoint(config, 7)
    code = cli.main(["doctor", "--json", str(config.directory / "config.yaml")])
    texts = [f["text"] for f in json.loads(capsys.readouterr().out)["findings"]]
    assert code == 0
    assert "a start goes on from step-00000007.ckpt, which is whole" in texts
    assert any(text.startswith("mine: 1 start, ") for text in texts)


def test_a_run_without_a_checkpoint_still_needs_the_file_that_it_begins_from(patient, capsys):
    config = patient.begun()  # of which the weights are taken
    torch.save(build_model(config).state_dict(), "weights.pth")
    config = open_run(completed(config, run={"id": "tuned"}, model={
        "init": "weights.pth", "init_digest": file_sha256(Path("weights.pth")),
    }))  # fmt: skip
    (config.directory / STARTED).touch()

    def weights() -> dict[str, Any]:
        cli.main(["doctor", "--json", str(config.directory / "config.yaml")])
        (found,) = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["name"] == "weights"]
        return found

    assert weights()["text"].startswith("begins from weights.pth")
    Path("weights.pth").unlink()
    assert weights() == {
        "name": "weights", "state": "fault", "section": "arithmetic",
        "text": "model.init = weights.pth: No such file or directory",
        "way_out": "bring the file back, or start a new run",
    }  # fmt: skip
    patient.checkpoint(config, 5)
    assert (weights()["state"], weights()["text"]) == (
        "ok", "the run has a checkpoint, and needs the file of model.init no more",
    )  # fmt: skip


def test_images_that_grow_are_said_with_their_sizes(patient, capsys):
    patient.words = (*GROWING, "augment.growth_steps=2", "model.name=resnet18", "data.image_size=64")
    (found,) = [f for f in patient.examined(capsys)["findings"] if f["name"] == "sizes"]
    assert (found["state"], found["text"]) == ("ok", "images of 32, 48, 64 pixels a side, one after the other")


def test_the_table_says_what_json_says_and_ends_in_a_verdict(patient, capsys):
    words = ["doctor", *SMALL, f"data.root={patient.shards}", "data.global_batch_size=500"]
    assert cli.main(words) == 2
    output = capsys.readouterr().out
    assert "data.global_batch_size = 500 exceeds" in output
    assert "-> lower it to 130" in output
    assert output.strip().splitlines()[-1].startswith("NO GO: ")


def test_an_installation_without_rich_is_told_what_it_lacks(patient, capsys):
    real = versions.metadata.requires
    patient.patch.setattr(versions.metadata, "requires", lambda name: [*(real(name) or []), "not-there>=3"])
    for name in ("rich.console", "pipeline.doctor.table"):
        patient.patch.setitem(sys.modules, name, None)
    assert cli.main(["doctor", *SMALL, f"data.root={patient.shards}"]) == 2
    output = capsys.readouterr().out
    assert "fault    not-there: not-there is not installed, not-there>=3 is required -> pip install" in output
    assert output.strip().splitlines()[-1].startswith("NO GO: 1")


def test_all_mistyped_words_are_found_at_once():
    config, found = compose(["recipe=bn_x6", "seed=many", "trainer.max_epoch=3", "cluster.devices=2", "noword"])
    texts = " ".join(f.text for f in found if f.state == "fault")
    assert config is not None
    assert config.cluster.devices == 2
    for said in ("recipe = 'bn_x6'", "seed = 'many'", "trainer.max_epoch is not a key", "'noword' is not key=value"):
        assert said in texts
    assert len(found) == 5


def test_a_key_is_known_by_the_server_and_shown_nowhere(patient, capsys):
    with WandbServer() as server:
        for name, value in server.environment.items():
            patient.patch.setenv(name, value)
        patient.words = ("tracking.mode=online",)
        report = patient.examined(capsys)
    assert "online: a key is there, and the server knows it" in [f["text"] for f in report["findings"]]
    assert KEY not in json.dumps(report)


def test_a_refused_key_is_a_fault_only_where_online_is_demanded(patient, capsys):
    with WandbServer(every=401) as server:
        for name, value in server.environment.items():
            patient.patch.setenv(name, value)
        states = []
        for mode in ("online", "auto"):
            patient.words = (f"tracking.mode={mode}",)
            report = patient.examined(capsys)
            states += [f["state"] for f in report["findings"] if "status 401" in f["text"]]
    assert states == ["fault", "warning"]
    assert KEY not in json.dumps(report)


def test_a_check_that_crashes_is_a_fault_of_its_name_without_secrets(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "do-not-show-this")

    def crash() -> list[Any]:
        raise RuntimeError("broke on do-not-show-this\nand more")

    (found,) = guarded("machine", "clock", crash)
    assert (found.name, found.state) == ("clock", "fault")
    assert found.text == "the check itself failed: RuntimeError: broke on ***"


def test_a_password_in_a_url_is_shown_nowhere(patient, capsys):
    patient.words = ("data.root=https://me:hunter22@host.invalid/set?sig=hunter23",)
    report = json.dumps(patient.examined(capsys))
    assert "://***@host.invalid/set?***" in report
    assert "hunter" not in report


def test_findings_before_a_crash_stay(patient, capsys):
    patient.patch.setattr(examination, "_by_slurm", lambda config: 1 / 0)
    report = patient.examined(capsys)
    assert "130 train, 35 val images in 5 classes" in [f["text"] for f in report["findings"]]
    assert report["findings"][-1]["text"].startswith("the check itself failed: ZeroDivisionError")
    assert report["exit_code"] == 2


def test_what_takes_too_long_is_left_to_itself():
    with pytest.raises(TimeoutError, match="no answer within"):
        within(0.05, lambda: time.sleep(5))
    assert within(5, lambda: 3) == 3


def test_ctrl_c_ends_it_at_once(patient, capsys):
    def interrupt(*_: object) -> list[Any]:
        raise KeyboardInterrupt

    patient.patch.setattr(packed, "open_here", interrupt)
    assert cli.main(["doctor", *SMALL]) == 1
    assert capsys.readouterr().err.strip().endswith("pipeline: interrupted")


def test_help_has_an_example_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    output = capsys.readouterr().out
    assert "pipeline doctor recipe=bn_x5 data=digits cluster.devices=2" in output
    assert "exit codes: 0 go" in output


def test_a_version_is_compared_by_its_release():
    assert versions.satisfies("2.15.0+cu132", ">=2.11")
    assert versions.satisfies("2.6.6", ">=2.6.6,!=2.6.2,!=2.6.3,<2.7")
    assert not versions.satisfies("2.6.3", ">=2.6,!=2.6.2,!=2.6.3")
    assert not versions.satisfies("2.7", "<2.7")
    assert versions.satisfies("0.31", "<0.31.1,>=0.31.0")


def test_a_missing_extension_is_a_fault_only_for_a_run_that_needs_it():
    states = [next(versions.check_decoder(*case)).state
              for case in (("", True), ("", False), ("regions", False), ("whole", False))]  # fmt: skip
    assert states == ["ok", "warning", "fault", "warning"]


def test_statistics_are_over_the_images_of_a_group_in_a_micro_batch():
    def said(*cut: int) -> str:
        return next(arithmetic.check_statistics(arithmetic.Cut(*cut), normalized=True)).text

    assert said(256, 8) == "over 256 images, all ranks"
    assert said(256, 8, 0, 2) == "over 64 images, groups of 2 ranks"
    assert said(130, 4, 0, 2).startswith("over 64 to 66 images")
    assert said(256, 4, 16).startswith("over 64 images, all ranks: those of a micro-batch")
    assert said(256, 8, 0, 1) == "over 32 images, each rank for itself"


def test_few_images_have_a_remedy_that_is_one():
    def remedy(*cut: int, **norm: int) -> str:
        return next(arithmetic.check_statistics(arithmetic.Cut(*cut), normalized=True, **norm)).way_out

    assert remedy(32, 8, 0, 2) == "norm.group_size=0"
    assert remedy(32, 8, 0, 2, group_images=8) == "raise norm.group_images"  # which group_size=0 goes with
    assert remedy(64, 4, 2, 4, group_images=8) == "a larger data.micro_batch_size"


def test_norms_that_are_frozen_are_not_said_to_be_none(patient, capsys):
    def said(normalized: bool) -> str:
        return next(arithmetic.check_statistics(arithmetic.Cut(32, 1), normalized, frozen="all")).text

    assert said(normalized=False) == "the model has no batch normalization"
    assert (
        said(normalized=True) == "all norms keep those that were loaded (norm.frozen = all): none are taken of a batch"
    )
    patient.words = ("norm.frozen=statistics", "model.init=weights.pth")
    texts = [f["text"] for f in patient.examined(capsys)["findings"] if f["name"] == "statistics"]
    assert texts == ["all norms keep those that were loaded (norm.frozen = statistics): none are taken of a batch"]


def test_a_rate_that_grows_much_without_a_warm_up_is_warned_about():
    def state(warmup: float) -> str:
        schedule = Schedule(0.1, 32, 1024, 10_000, 0.9, 1.0, warmup)
        return next(arithmetic.check_rate(schedule, 100)).state

    assert [state(0), state(5)] == ["warning", "ok"]


def test_a_curve_that_does_not_end_with_the_run_is_warned_about():
    schedule = Schedule(0.1, 32, 64, 6400, form="cosine", epochs=9.0)
    states = [next(arithmetic.check_rate(schedule, steps)).state for steps in (900, 600)]
    assert states == ["ok", "warning"]


def test_a_curve_is_made_to_end_where_the_run_does(patient, capsys):
    def way_out(steps: int, max_epochs: int, warmup: float = 0.0) -> str:
        schedule = Schedule(0.1, 32, 64, 6400, form="cosine", epochs=9.0, warmup_epochs=warmup)
        return next(arithmetic.check_rate(schedule, steps, max_epochs)).way_out

    assert way_out(600, 6) == "schedule.epochs=0 in a new run, for trainer.max_epochs"
    assert way_out(250, 9) == "schedule.epochs=2.5 in a new run, for trainer.max_steps"  # at 0 it is 9 all the same
    assert way_out(250, -1) == "schedule.epochs=2.5 in a new run, for trainer.max_steps"
    assert way_out(250, 9, 5.0).endswith("trainer.max_steps, and a schedule.warmup_epochs below that")
    patient.words = ("schedule.form=cosine", "trainer.max_epochs=8", "trainer.max_steps=10")
    (found,) = [f for f in patient.examined(capsys)["findings"] if f["name"] == "rate"]
    assert (found["state"], found["way_out"]) == (
        "warning",
        "schedule.epochs=1.846 in a new run, for trainer.max_steps",
    )
    patient.words = (*patient.words, "schedule.epochs=1.846")
    (found,) = [f for f in patient.examined(capsys)["findings"] if f["name"] == "rate"]
    assert found["state"] == "ok"


def test_a_batch_that_leaves_out_much_of_an_epoch_is_warned_about():
    (found,) = arithmetic.check_batch(70, 130)
    assert found.state == "warning"
    assert "leaves out 60 of 130 images (46%" in found.text
    assert found.way_out == "data.global_batch_size=65"


def test_a_checkpoint_takes_the_room_that_is_said(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.BatchNorm1d(100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3, 200)).sum().backward()
    optimizer.step()
    path = tmp_path / "a.ckpt"
    write_checkpoint({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, path)
    assert abs(path.stat().st_size / directory.checkpoint_bytes(model, 4) - 1) < 0.1


def test_a_lock_of_a_dead_process_gives_way(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / LOCK).write_text(json.dumps(asdict(this_process()) | {"process": ended.pid, "began": 1}))
    (found,) = directory.check_holder(tmp_path)
    assert (found.state, found.name) == ("ok", "holder")


def test_two_locks_on_one_directory_are_refused_and_leave_nothing(tmp_path):
    (found,) = directory.check_lock(tmp_path / "run")
    assert found.state == "ok"
    assert list((tmp_path / "run").iterdir()) == []


def test_shards_sorted_by_class_are_warned_about_where_a_window_is_small():
    labels = torch.arange(8).repeat_interleave(30).numpy()
    states = [next(packed.check_mixing([30] * 8, labels, 24, window, seed=0)).state for window in (0, 2)]
    assert states == ["ok", "warning"]
    (found,) = packed.check_mixing([30] * 8, labels, 24, 2, seed=0)
    assert "sorted by class" in found.text


def test_foreign_tars_are_not_indexed_by_looking(patient, capsys):
    for path in patient.shards.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    before = files(patient.shards)
    report = patient.examined(capsys)
    (found,) = [f for f in report["findings"] if f["name"] == "root"]
    assert (found["state"], report["exit_code"]) == ("warning", 0)
    assert "not indexed yet" in found["text"]
    assert "pipeline shards index" in found["way_out"]
    assert files(patient.shards) == before


@pytest.fixture
def server(shards):
    with faulty_server() as server:
        server.files = {f"/set/{path.name}": path.read_bytes() for path in shards.iterdir()}
        yield server


def test_a_remote_set_is_judged_by_its_tables_and_a_few_images(patient, capsys, server):
    patient.words = (f"data.root={server.url}/set", "data.cache=cache", "data.window=2", "data.cache_gb=1")
    report = patient.examined(capsys)
    texts = {f["name"]: f["text"] for f in report["findings"]}
    assert report["exit_code"] == 0
    assert texts["images"] == "8 of 165 read, and as they were indexed"
    assert texts["tables"] == "130 train, 35 val images in 5 classes"
    assert texts["cache"].startswith("two windows of shards fit")
    assert not list(Path("cache").rglob("*.tar"))


def test_a_server_that_keeps_silent_costs_no_more_than_its_time(patient, capsys, server):
    server.fail("/set/dataset.json", Fault(delay=30), forever=True)
    patient.patch.setattr(presence, "REMOTE_SECONDS", 0.3)
    patient.words = (f"data.root={server.url}/set", "data.cache=cache")
    report = patient.examined(capsys)
    (found,) = [f for f in report["findings"] if f["name"] == "root"]
    assert (found["state"], report["exit_code"]) == ("fault", 3)
    assert "no answer within 0.3 s" in found["text"]
    assert "credentials" in found["way_out"]


def test_faults_of_a_remote_set_are_found_in_seconds(patient, capsys, server):
    remote = (f"data.root={server.url}/set", "data.cache=cache", "data.window=2")
    for name, content in server.files.items():
        if name.startswith("/set/val") and name.endswith(".tar"):
            server.files[name] = bytes(len(content))
    cases = [
        ((*remote, "data.cache_gb=0.0001"), "is less than two windows of shards", "data.cache_gb="),
        (remote, "4 of 8 images read are damaged", "pipeline shards verify"),
        (("data.root=http://127.0.0.1:9/set", "data.cache=cache"), "127.0.0.1:9", ""),
    ]
    for words, said, way_out in cases:
        patient.words = words
        report = patient.examined(capsys)
        assert report["exit_code"] == 3
        assert [f for f in report["findings"] if said in f["text"] and way_out in f["way_out"]], report["findings"]


STAGED = ("data.stage=true", "data.cache=cache", "data.window=2")


def test_a_staged_set_is_judged_where_it_lies_and_its_cache_by_what_is_to_come(patient, capsys):
    patient.words = STAGED
    before = files(patient.shards.parent)
    report = patient.examined(capsys)
    texts = {f["name"]: f["text"] for f in report["findings"]}
    assert report["exit_code"] == 0
    assert texts["shards"].startswith("7 shards, 0.625 MB, all there and of their sizes")
    assert texts["images"] == "165 of 165 read, and as they were indexed"
    assert "lies on the file system of" in texts["cache"]
    assert files(patient.shards.parent) == before  # nothing was staged for it
    os.truncate(patient.shards / "train-000001.tar", 1000)
    assert patient.examined(capsys)["exit_code"] == 3


def test_what_a_cache_to_stage_to_lacks_is_found(patient, capsys):
    Path("file").write_text("in the way")
    cases = [
        ((*STAGED, "data.cache_gb=0.0001"), "fault", "is less than two windows of shards", "data.cache_gb="),
        ((*STAGED, "data.cache=file/cache"), "warning", "cannot be written (Not a directory)", "another directory"),
        ((*STAGED, "data.cache=$NOWHERE/a"), "fault", "NOWHERE is not set on this node", "name the directory without"),
    ]
    for words, state, said, way_out in cases:
        patient.words = words
        report = patient.examined(capsys)
        assert [
            f for f in report["findings"] if f["state"] == state and said in f["text"] and way_out in f["way_out"]
        ], report["findings"]


def test_a_cache_of_the_nodes_is_not_judged_by_the_machine_that_submits(patient, capsys):
    patient.words = (*STAGED, "data.cache=$NOWHERE/a", "cluster=slurm_1x8", "cluster.accelerator=cpu")
    report = patient.examined(capsys)
    (found,) = [f for f in report["findings"] if f["name"] == "cache"]
    assert (found["state"], found["text"]) == (
        "ok", "two windows of shards fit; whether $NOWHERE/a of the nodes has room, a start there says"
    )  # fmt: skip
    assert [f for f in report["findings"] if f["section"] == "data" and f["state"] == "fault"] == []


def test_more_ranks_than_gpus_share_one():
    (found,) = machine.check_devices("cuda", devices=8, gpus=4, built=True, elsewhere=False)
    assert (found.state, found.way_out) == ("fault", "cluster.devices=4")
    (found,) = machine.check_devices("cuda", devices=8, gpus=0, built=True, elsewhere=True)
    assert found.state == "warning"
    (found,) = machine.check_devices("auto", devices=4, gpus=4, built=True, elsewhere=False)
    assert found.state == "ok"


def test_a_machine_that_is_too_small_is_said():
    assert next(machine.check_open_files(256, shards=256, workers=8)).state == "fault"
    assert next(machine.check_open_files(-1, shards=256, workers=8)).state == "ok"
    assert next(machine.check_memory(1_000_000_000, ranks=2, workers=4)).state == "fault"
    assert next(machine.check_memory(64_000_000_000, ranks=2, workers=4)).state == "ok"
    assert next(machine.check_processors(4, ranks=4, threads=2, workers=1, cuda=False)).state == "warning"
    assert next(machine.check_processors(16, ranks=8, threads=8, workers=1, cuda=True)).state == "ok"
    assert next(machine.check_clock(0.0, 0.0)).state == "fault"
    assert next(machine.check_clock(1.8e9, 1.8e9 + 100)).state == "warning"
    assert next(network.check_host("a", 2, resolve=lambda name: "127.0.1.1")).state == "fault"


def test_a_network_names_what_would_be_taken():
    up = [network.Interface("lo", ("IPv4",), "127.0.0.1"), network.Interface("docker0", ("IPv4",), "172.17.0.1"),
          network.Interface("eth0", ("IPv4", "IPv6"), "10.0.0.5")]  # fmt: skip
    (found,) = network.check_network(up, 2, "10.0.0.5", ["mlx5_0"], {})
    assert found.state == "ok"
    assert "InfiniBand mlx5_0; gloo takes eth0; NCCL takes eth0" in found.text
    assert next(network.check_network(up[:1], 2, "127.0.0.1", [], {})).state == "fault"
    (found,) = network.check_network(up, 2, "10.0.0.5", [], {"NCCL_SOCKET_IFNAME": "ib0"})
    assert found.state == "fault"
    assert "unset NCCL_SOCKET_IFNAME" in found.way_out


def test_a_network_that_does_not_lead_to_rank_0_is_named_with_the_one_that_does():
    up = [network.Interface("lo", ("IPv4",), "127.0.0.1"), network.Interface("eth0", ("IPv4",), "10.0.0.5"),
          network.Interface("ib0", ("IPv4",), "10.1.0.5")]  # fmt: skip
    (found,) = network.check_network(up, 2, "10.0.0.5", [], {}, default="eth0", towards="ib0")
    assert (found.state, found.name) == ("warning", "network")
    assert "the default route is eth0; rank 0 is reached by ib0: gloo would take another" in found.text
    assert "slurm.interface=ib0" in found.way_out
    chosen = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert next(network.check_network(up, 2, "10.0.0.5", [], chosen, towards="ib0")).state == "ok"
    assert next(network.check_network(up, 2, "10.0.0.5", [], {}, towards="eth0")).state == "ok"
    assert next(network.check_host("a", 2, resolve=lambda name: "127.0.1.1", chosen="ib0")).state == "ok"


@pytest.mark.parametrize(("variables", "state"), [
    ({}, "ok"), ({"NCCL_IB_DISABLE": "1"}, "warning"), ({"NCCL_IB_HCA": "mlx5_9"}, "fault"),
    ({"NCCL_IB_HCA": "=mlx5_0:1"}, "ok"), ({"NCCL_IB_HCA": "^mlx5_9"}, "ok"),
])  # fmt: skip
def test_infiniband_that_is_left_out_or_misnamed_is_said(variables, state):
    up = [network.Interface("eth0", ("IPv4",), "10.0.0.5")]
    found = list(network.check_network(up, 2, "10.0.0.5", ["mlx5_0"], variables))
    assert [f.state for f in found if f.name == "InfiniBand"] == ([] if state == "ok" else [state])


def test_an_adapter_counts_once_a_port_has_a_link(tmp_path):
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        (tmp_path / name / "ports" / "1").mkdir(parents=True)
        (tmp_path / name / "ports" / "1" / "state").write_text(f"{state}\n")
    assert network.infiniband(tmp_path) == ["mlx5_0"]
    assert network.infiniband(tmp_path / "none") == []


def test_the_default_route_and_the_way_to_a_host_name_their_interface(tmp_path):
    (tmp_path / "route").write_text("Iface\tDestination\tGateway\nib0\t0000000A\t0\neth0\t00000000\t0100000A\n")
    assert network.default_interface(tmp_path / "route") == "eth0"
    assert network.interface_towards("127.0.0.1", network.interfaces()) == "lo"
    assert network.interface_towards("no.such.host.invalid", network.interfaces()) == ""


def test_slurm_that_does_not_answer_is_a_fault_where_it_is_to_run_the_job():
    def silent(command: Any) -> str:
        raise subprocess.CalledProcessError(1, command, stderr="slurm_load_partitions: Unable to contact controller")

    (found,) = slurm.check_submission(True, run=silent)
    assert found.state == "fault"
    assert "Unable to contact controller" in found.text
    assert next(slurm.check_submission(False, run=silent)).state == "warning"
    answers = iter(["slurm 23.11", "gpu* up 4\nold down 2"])
    (found,) = slurm.check_submission(True, run=lambda command: next(answers))
    assert found == ok("Slurm", "slurm 23.11; partitions gpu* (4 nodes)")


def test_what_slurm_says_of_a_job_is_a_finding(tmp_path):
    def refused(script: Path, seconds: float) -> str:
        raise QueueError("sbatch: error: Invalid qos, sbatch: error: Batch job submission failed; change the keys")

    said = "sbatch: Job 7 to start at 2027-01-02T03:04:05 using 16 processors on nodes n[1-2] in partition gpu\n"
    (found,) = slurm.check_job("#!/bin/bash\n", tmp_path, asked=lambda script, seconds: said)
    assert found == ok("job", "Slurm would take it: it could start at 2027-01-02T03:04:05 using 16 processors on nodes "
                       "n[1-2] in partition gpu")  # fmt: skip
    (found,) = slurm.check_job("#!/bin/bash\n", tmp_path, asked=refused)
    assert (found.state, found.way_out) == ("fault", "change the keys")
    assert found.text == "sbatch: error: Invalid qos, sbatch: error: Batch job submission failed"


def test_a_step_is_measured_within_its_time_and_no_larger_than_the_share():
    taken: list[int] = []
    measured = MEASURED(taken.append, most=12, budget=0.05)
    assert max(taken) == measured.images == 12
    assert MEASURED(lambda images: time.sleep(0.2), most=12, budget=0.1) == pace.Pace(2, ANY, 0)
    step, run = pace.check_pace(pace.Pace(10, 0.1, 5), images=1000, steps=30, batch=100, world=2, device="cpu")
    assert "100 images/s, 8.64 million a day; on this machine, one process" in step.text
    assert "an epoch takes 10 s, the run of 30 steps 30 s by one process, 15 s by 2" in run.text
    step, run = pace.check_pace(pace.Pace(2, 0.5, 0), images=1000, steps=30, batch=100, world=1, device="cpu")
    assert "the first one, later ones take less): at least 4 images/s" in step.text
    assert "an epoch takes at most 4.2 min" in run.text


def test_a_step_of_images_that_grow_is_one_at_full_size():
    step, run = pace.check_pace(
        pace.Pace(10, 0.1, 5), images=1000, steps=30, batch=100, world=2, device="cpu", grows=True
    )
    assert step.text.endswith("one process, cpu, without loading, at full size")
    assert "an epoch takes at most 10 s, the run of 30 steps at most 30 s by one process, at most 15 s by 2" in run.text


@pytest.mark.parametrize(("name", "words"), [
    ("SGD", ()), ("Lars", ("optimizer.name=lars",)), ("Lamb", ("optimizer.name=lamb", "optimizer.nesterov=false")),
])  # fmt: skip
def test_a_step_is_one_of_the_runs_own_optimizer(name, words, patient, capsys):
    patient.patch.setattr(pace, "measured", MEASURED)
    patient.patch.setattr(examination, "PACE_SECONDS", 0.05)
    patient.words = (*words, *GROWING, "data.image_size=32", "optimizer.weight_decay=0.01")
    taken: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: taken.append(optimizer))
    try:
        report = patient.examined(capsys)
    finally:
        hook.remove()
    assert {type(optimizer).__name__ for optimizer in taken} == {name}
    assert [group["weight_decay"] for group in taken[0].param_groups] == [0.01, 0.0]
    (found,) = [f for f in report["findings"] if f["name"] == "step"]
    assert "at full size" in found["text"]
