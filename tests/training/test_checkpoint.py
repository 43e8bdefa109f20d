import os
import threading
import zipfile

import pytest
import torch

from pipeline.training import checkpoint_io
from pipeline.training.checkpoint import BEST, _tidy, checkpoints, clear, newest, set_aside
from pipeline.training.checkpoint_io import STAMP, CheckpointError, CheckpointFiles, damage, write_checkpoint


def state(value: float) -> dict:
    return {"state_dict": {"weight": torch.full((1000,), value)}, "global_step": int(value)}


def written(directory, step: int):
    path = directory / f"step-{step:08d}.ckpt"
    write_checkpoint(state(step), path)
    return path


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = written(tmp_path, 1)

    def torn(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(state(2), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # the old one, and nothing beside it
    assert damage(path) == ""


def test_a_save_copies_and_writes_beside_the_training(tmp_path, monkeypatch):
    may_write, files = threading.Event(), CheckpointFiles()
    write = checkpoint_io.write_checkpoint
    monkeypatch.setattr(checkpoint_io, "write_checkpoint", lambda *a: may_write.wait(30) and write(*a))
    weight = torch.zeros(3)
    path = tmp_path / "step-00000001.ckpt"
    files.save_checkpoint({"state_dict": {"weight": weight}}, path)
    weight += 1  # the training goes on
    assert not path.exists()
    may_write.set()
    files.teardown()
    assert files.load_checkpoint(path)["state_dict"]["weight"].tolist() == [0, 0, 0]


def test_a_full_disk_leaves_the_last_good_one_and_is_said(tmp_path, monkeypatch):
    files, path = CheckpointFiles(), written(tmp_path, 1)

    def full(checkpoint, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    files.save_checkpoint(state(2), tmp_path / "step-00000002.ckpt")
    files.finish()
    assert files.failure == "step-00000002.ckpt: No space left on device"
    assert newest(tmp_path) == (path, {})
    monkeypatch.undo()
    files.save_checkpoint(state(2), tmp_path / "step-00000002.ckpt")
    files.teardown()
    assert files.failure == ""


def test_torch_does_not_hide_why_a_file_could_not_be_written(tmp_path, monkeypatch):
    class Full:
        """Opens /dev/full, on which nothing can be written, in place of any file."""

        def open(self, *arguments, **options):
            return open("/dev/full", "wb", buffering=0)  # noqa: PTH123

        def unlink(self, missing_ok):
            pass

    monkeypatch.setattr(type(tmp_path), "with_name", lambda self, name: Full())
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(state(2), tmp_path / "step-00000002.ckpt")


def test_loading_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("owned").touch, ())

    path = tmp_path / "step-00000003.ckpt"
    torch.save({"state_dict": Payload(), STAMP: {"format": 1}}, path)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        CheckpointFiles().load_checkpoint(path, weights_only=False)  # whatever the caller asks for
    assert "holds more than tensors and plain values" in damage(path)
    assert not (tmp_path / "owned").exists()


def test_the_newest_is_the_one_of_most_steps_and_half_written_ones_do_not_count(tmp_path):
    assert newest(tmp_path) == (None, {})
    for step in (9, 100):
        written(tmp_path, step)
    for name in ("best.ckpt", ".step-00000200.ckpt.1.tmp", "step-x.ckpt"):
        (tmp_path / name).touch()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009.ckpt", "step-00000100.ckpt"]
    assert newest(tmp_path) == (tmp_path / "step-00000100.ckpt", {})


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_torn_one_is_passed_over_with_a_warning(tmp_path, keep):
    good, torn = written(tmp_path, 1), written(tmp_path, 2)
    content = torn.read_bytes()
    torn.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert newest(tmp_path) == (good, {torn: damage(torn)})


def test_a_flipped_bit_in_any_tensor_is_found(tmp_path):
    good, path = written(tmp_path, 1), written(tmp_path, 2)
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 2000] ^= 1
    path.write_bytes(content)
    assert "damaged" in damage(path)
    assert newest(tmp_path) == (good, {path: damage(path)})


def test_one_of_another_run_is_passed_over_and_what_differs_is_named(tmp_path):
    narrow, wide = {"model.width": 0.5, "seed": 1}, {"model.width": 1.0, "seed": 1, "model.new": 3}
    good, other = written(tmp_path, 1), tmp_path / "step-00000002.ckpt"
    write_checkpoint(state(2), other, wide)
    assert newest(tmp_path, narrow) == (good, {other: "of another run (model.width = 1.0, here 0.5)"})
    assert newest(tmp_path, {"seed": 1, "model.newer": 4}) == (other, {})  # a key that one of them lacks is no rule


def test_a_file_set_aside_neither_counts_nor_is_lost(tmp_path):
    good, torn = written(tmp_path, 1), written(tmp_path, 2)
    torn.write_bytes(b"half")
    aside = set_aside(torn)
    _tidy(good, keep=1, best=False)
    assert newest(tmp_path) == (good, {})
    assert aside.read_bytes() == b"half"
    torn.write_bytes(b"again")
    assert set_aside(torn) != aside
    assert aside.read_bytes() == b"half"


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    good = written(tmp_path, 1)
    ended, mine = 2**30, os.getpid()  # no process can have that number
    for name in (f".step-00000002.ckpt.{ended}.tmp", f".best.ckpt.{ended}.tmp", f".step-00000003.ckpt.{mine}.tmp"):
        (tmp_path / name).touch()
    clear(tmp_path)
    assert set(tmp_path.iterdir()) == {good, tmp_path / f".step-00000003.ckpt.{mine}.tmp"}  # it is still being written


def test_a_foreign_file_is_passed_over_and_none_whole_is_refused(tmp_path):
    torch.save({"model": torch.ones(3)}, tmp_path / "step-00000007.ckpt")
    assert damage(tmp_path / "step-00000007.ckpt") == "not written by this program"
    said = r"holds 1 checkpoints and none to go on from \(step-00000007.ckpt is not written by this program\); bring"
    with pytest.raises(CheckpointError, match=said):
        newest(tmp_path)


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    written(tmp_path, 1)
    torch.save({**state(2), STAMP: {"format": 99}}, tmp_path / "step-00000002.ckpt")
    with pytest.raises(
        CheckpointError, match="has format 99, this version reads up to 1; go on with the newer version"
    ):
        newest(tmp_path)


def test_files_beyond_the_newest_are_removed_and_the_best_is_kept(tmp_path):
    for step in (1, 2, 3):
        path = written(tmp_path, step)
        _tidy(path, keep=2, best=step == 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEST, "step-00000002.ckpt", "step-00000003.ckpt"]
    assert CheckpointFiles().load_checkpoint(tmp_path / BEST)["global_step"] == 1
