import pickle

import pytest
import torch

from pipeline.training.checkpoint import AtomicCheckpointIO, checkpoints, newest


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.ones(3)}, path)

    def torn(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(3)}, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # the old one, and nothing beside it
    assert AtomicCheckpointIO().load_checkpoint(path)["weight"].tolist() == [1, 1, 1]


def test_loading_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("owned").touch, ())

    path = tmp_path / "foreign.ckpt"
    torch.save(Payload(), path)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)  # whatever the caller asks for
    assert not (tmp_path / "owned").exists()


def test_the_newest_is_the_one_of_most_steps(tmp_path):
    assert newest(tmp_path) is None
    for name in ("step-00000009.ckpt", "step-00000100.ckpt", "best.ckpt", ".step-00000200.ckpt.1.tmp", "step-x.ckpt"):
        (tmp_path / name).touch()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009.ckpt", "step-00000100.ckpt"]
    assert newest(tmp_path) == tmp_path / "step-00000100.ckpt"
