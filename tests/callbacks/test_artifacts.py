import json
import signal
import time
from pathlib import Path

import pytest
import wandb

from pipeline.callbacks import wandb_reporter
from pipeline.callbacks.artifacts import Artifacts, kept
from pipeline.callbacks.segments import segments
from pipeline.callbacks.sync import SyncError, synchronize
from pipeline.callbacks.wandb_reporter import WandbReporter
from tests.callbacks.test_wandb_reporter import PLACE, client, row, server, write

__all__ = ["client", "server"]

CHECKPOINT, DATASET = f"checkpoint-{PLACE.id}", "dataset-digits"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's directory after a validation at step 5, its best so far, and six steps more."""
    directory = tmp_path / "run"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "dataset.json").write_text(json.dumps({"digest": "d" * 64}))
    note(directory)
    save(directory, 5, best=True)
    save(directory, 11)
    write(directory / "metrics.csv", [row(5, "train"), row(5, "val")])
    return directory


def note(directory: Path, **facts: object) -> None:
    starts = [{"at": "2026-01-01T00:00:00+00:00", "step": 0, "code": "c0de", **facts}]
    (directory / "run.json").write_text(json.dumps({"wandb_id": PLACE.id, "starts": starts}))


def save(directory: Path, step: int, *, best: bool = False) -> None:
    for name in (f"step-{step:08d}.ckpt", *(["best.ckpt"] if best else [])):
        (directory / "checkpoints" / name).write_bytes(f"weights of step {step}".encode())


def start(directory: Path, how: str = "digests", *, mode: str = "auto", interrupted: bool = False) -> list[str]:
    """A start of the run, to its end; returns what it says."""
    said: list[str] = []
    reporter = WandbReporter(PLACE, directory=directory, mode=mode, config={}, say=said.append,
                             artifacts=Artifacts(directory, PLACE.id, "digits", how))  # fmt: skip
    reporter.append(row(5, "train"))
    if interrupted:
        reporter.interrupted()
    reporter.close()
    wandb.teardown()
    return said


def send(directory: Path, how: str = "digests", **options) -> list[str]:
    said: list[str] = []
    artifacts = Artifacts(directory, PLACE.id, "digits", how)
    synchronize(directory, PLACE, seconds=30, artifacts=artifacts, say=said.append, **options)
    return said


def test_a_run_leaves_its_best_and_last_checkpoint_and_names_its_data_set(server, run):
    assert start(run) == []
    best, last = server.version(f"{CHECKPOINT}:best"), server.version(f"{CHECKPOINT}:last")
    assert (best.number, set(best.aliases), best.metadata["top1"]) == (0, {"best", "step-5"}, 0.25)
    assert (last.number, set(last.aliases), last.metadata) == (1, {"last", "step-11", "latest"}, {"step": 11})
    assert {version.state for version in server.versions.values()} == {"COMMITTED"}
    data = server.version(f"{DATASET}:latest")
    assert (data.kind, data.used_by, data.metadata) == ("dataset", [PLACE.id], {"digest": "d" * 64})
    assert best.by == last.by == PLACE.id


def test_an_interrupted_start_leaves_them_too(server, run):
    assert start(run, interrupted=True) == []
    assert server.version(f"{CHECKPOINT}:last").metadata == {"step": 11}
    assert server.run.exit_code == wandb_reporter.RESUMABLE


def test_by_default_no_file_leaves_the_machine(server, run):
    start(run)
    assert all(version.content == {} for version in server.versions.values())
    assert not any(b"weights of step" in body for body in server.received)
    path = run / "checkpoints" / "step-00000011.ckpt"
    (entry,) = server.version(f"{CHECKPOINT}:last").files.values()
    assert (entry["ref"], entry["size"]) == (path.as_uri(), path.stat().st_size)


def test_as_files_every_byte_arrives_and_none_is_copied_on_the_way(server, run, monkeypatch, tmp_path):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    start(run, "files")
    assert server.version(f"{CHECKPOINT}:last").content == {"model.ckpt": b"weights of step 11"}
    assert server.version(f"{CHECKPOINT}:best").content == {"model.ckpt": b"weights of step 5"}
    assert server.version(f"{DATASET}:latest").content == {"dataset.json": (run / "dataset.json").read_bytes()}
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(run)]
    assert not any(b"weights of step" in path.read_bytes() for path in copies)


def test_the_files_of_a_run_known_by_digest_are_sent_when_they_are_asked_for(server, run):
    start(run)
    start(run, "files")
    assert server.version(f"{CHECKPOINT}:last").content == {"model.ckpt": b"weights of step 11"}


def test_a_file_that_w_and_b_has_is_not_followed_by_a_word_of_where_it_lies(server, run):
    start(run, "files")
    server.calls.clear()
    assert not any("artifacts" in line for line in send(run))
    assert "CreateArtifact" not in server.calls


def test_what_was_moved_lies_elsewhere_and_another_project_has_nothing_yet(server, run, tmp_path):
    start(run)
    moved = run.rename(tmp_path / "moved")
    assert [each.key for each in Artifacts(moved, PLACE.id, "digits", "digests").missing()] == [
        f"{DATASET}:digest-dddddddddddd", f"{CHECKPOINT}:best", f"{CHECKPOINT}:last"]  # fmt: skip
    moved.rename(run)
    assert Artifacts(run, PLACE.id, "digits", "digests").missing() == []
    assert len(Artifacts(run, PLACE.id, "digits", "digests", "team/other").missing()) == 3


def test_one_that_is_refused_holds_up_no_other(server, run):
    taken = server.CreateArtifact
    server.CreateArtifact = lambda variables: (
        {"errors": [{"message": "no"}]} if variables["input"]["artifactTypeName"] == "dataset" else taken(variables)
    )
    (line,) = start(run)
    assert line.startswith("W&B has not confirmed every checkpoint (")
    assert {version.kind for version in server.versions.values()} == {"model"}


def test_a_start_that_failed_sends_none_and_is_failed_whatever_was_said_before(server, run):
    reporter = WandbReporter(PLACE, directory=run, mode="auto", config={},
                             artifacts=Artifacts(run, PLACE.id, "digits", "digests"))  # fmt: skip
    reporter.interrupted()
    reporter.failed()
    reporter.close()
    assert server.run.exit_code == 1
    assert not [version for version in server.versions.values() if version.kind == "model"]


def test_a_signal_while_files_are_sent_ends_the_start(server, run, monkeypatch):
    class Signal(BaseException):
        pass

    def signalled(*_: object) -> None:
        raise Signal

    monkeypatch.setattr(wandb_reporter, "HASTE_SECONDS", 2.0)
    server.fault["storage"] = 500
    reporter = WandbReporter(PLACE, directory=run, mode="auto", config={},
                             artifacts=Artifacts(run, PLACE.id, "digits", "files"))  # fmt: skip
    before = signal.signal(signal.SIGALRM, signalled)
    signal.setitimer(signal.ITIMER_REAL, 3)
    began = time.monotonic()
    try:
        with pytest.raises(Signal):
            reporter.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 15
    wandb.teardown()  # and the process can end


def test_the_same_bytes_are_one_version_that_is_best_and_last(server, run):
    save(run, 11, best=True)
    start(run)
    assert server.version(f"{CHECKPOINT}:best") is server.version(f"{CHECKPOINT}:last")


def test_a_later_start_adds_what_is_new_and_repeats_nothing(server, run):
    start(run)
    server.calls.clear()
    start(run)
    assert "CreateArtifact" not in server.calls
    save(run, 16)
    start(run)
    assert server.calls["CreateArtifact"] == 1
    last = server.version(f"{CHECKPOINT}:last")
    assert (last.number, last.metadata, set(last.aliases)) == (2, {"step": 16}, {"last", "step-16", "latest"})
    assert server.version(f"{CHECKPOINT}:step-11").number == 1


def test_changes_of_the_code_are_kept_where_there_are_any(server, run):
    start(run)
    assert not [version for version in server.versions.values() if version.kind == "code"]
    note(run, commit="1a2b", changed=True, changes="c0de.diff")
    (run / "code").mkdir()
    (run / "code" / "c0de.diff").write_text("- a\n+ b\n")
    start(run, "files")
    code = server.version(f"code-{PLACE.id}:latest")
    assert (code.content, code.metadata["commit"]) == ({"changes.diff": b"- a\n+ b\n"}, "1a2b")


@pytest.mark.parametrize("fault", [{"CreateArtifact": 30.0}, {"ArtifactType": 30.0}, {"storage": 500}])
def test_a_server_that_does_not_take_them_holds_up_no_exit_and_sync_sends_them(server, run, monkeypatch, fault):
    monkeypatch.setattr(wandb_reporter, "HASTE_SECONDS", 1.5)
    server.fault.update(fault)
    began = time.monotonic()
    (line, *_) = start(run)
    assert time.monotonic() - began < 15
    assert line.startswith("W&B has not confirmed every checkpoint (")
    assert line.endswith(f"pipeline sync {run}")
    server.fault.clear()
    server.closed.set()  # whoever is still waited for
    assert any("artifacts: " in line for line in send(run))
    assert server.version(f"{CHECKPOINT}:last").metadata == {"step": 11}


def test_an_offline_start_writes_no_copy_and_sync_sends_what_lies_there(server, run):
    start(run, "files", mode="offline")
    copies = [path for path in (run / "wandb").rglob("*") if path.is_file() and path.suffix != ".log"]
    assert not any(b"weights of step" in path.read_bytes() for path in copies)
    segment, rows, artifacts = send(run, "files")
    assert segment.startswith("offline-run-")
    assert rows.startswith("metrics.csv: 1 rows, to step 5")  # the validation, which this start has not told W&B of
    size = sum(each.path.stat().st_size for each in kept(run, PLACE.id, "digits")) / 1e6
    assert artifacts == (f"artifacts: {DATASET}:digest-dddddddddddd, {CHECKPOINT}:best, {CHECKPOINT}:last "
                         f"({size:,.1f} MB)")  # fmt: skip
    assert server.version(f"{CHECKPOINT}:last").content == {"model.ckpt": b"weights of step 11"}
    assert send(run, "files") == [f"{run}: nothing to send, W&B has every row"]


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(server, run):
    start(run, mode="offline")
    said = send(run, dry_run=True)
    assert [line.partition(":")[0] for line in said] == [
        f"would send {segments(run, PLACE.id)[0].name}", "would send metrics.csv", "would send artifacts",
    ]  # fmt: skip
    assert server.runs == {}
    assert server.versions == {}
    assert not segments(run, PLACE.id)[0].marker.exists()
    assert [line.removeprefix("would send ") for line in said] == send(run)  # and nothing else is


def test_a_dry_run_without_a_server_goes_by_what_is_marked_as_sent(server, run, monkeypatch):
    start(run, mode="offline")
    send(run)
    save(run, 16)
    monkeypatch.delenv("WANDB_API_KEY")
    first, *said = send(run, dry_run=True)
    assert "by what was marked as sent, for the server cannot be asked (there is no key for" in first
    assert said == ["would send metrics.csv: 1 rows, to step 5 (lost or refused before)",
                    f"would send artifacts: {CHECKPOINT}:last (their digests and places)"]  # fmt: skip


def test_a_sync_that_cannot_send_artifacts_says_so_and_goes_on_from_there(server, run):
    start(run, mode="offline")
    server.fault["CommitArtifact"] = 500
    with pytest.raises(SyncError, match="the same command goes on from there"):
        synchronize(run, PLACE, seconds=8, artifacts=Artifacts(run, PLACE.id, "digits", "digests"), say=lambda _: None)
    server.fault.clear()
    (line,) = send(run)
    assert line.startswith("artifacts: ")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"checkpoint-abc123:last": "old"}', '{"checkpoint-abc123:last": {}}']
)
def test_a_damaged_note_of_what_was_sent_means_that_all_is_sent_again(run, content):
    (run / "wandb").mkdir()
    (run / "wandb" / "artifacts.json").write_text(content)
    assert len(Artifacts(run, PLACE.id, "digits", "digests").missing()) == 3


def test_inputs_are_named_without_a_look_at_checkpoints_which_come_and_go_meanwhile(run, monkeypatch):
    def gone(self: Artifacts, each: object) -> dict[str, str]:
        assert each.kind == "dataset"
        return {}

    monkeypatch.setattr(Artifacts, "_identity", gone)
    monkeypatch.setattr(Artifacts, "_has", lambda self, each: self._identity(each) is None)
    (each,) = Artifacts(run, PLACE.id, "digits", "digests").missing(inputs_alone=True)
    assert each.is_input


def test_a_directory_that_is_no_run_any_more_is_a_complaint_and_no_traceback(server, run, capfd):
    (run / "run.json").write_text("{")
    said = start(run)
    assert said[0].startswith("W&B has not confirmed every checkpoint (")
    assert "Traceback" not in capfd.readouterr().err


def test_nobody_waits_for_the_inputs_of_a_run(server, run):
    server.fault["CreateArtifact"] = 30.0
    began = time.monotonic()
    reporter = WandbReporter(PLACE, directory=run, mode="auto", config={},
                             artifacts=Artifacts(run, PLACE.id, "digits", "digests"))  # fmt: skip
    assert time.monotonic() - began < 10
    assert reporter.artifacts._thread.is_alive()
    reporter.artifacts = None
    reporter.close()
