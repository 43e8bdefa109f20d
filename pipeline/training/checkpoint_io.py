"""Checkpoint files: whole or absent on disk, written beside the training, read without running code.

A save copies the tensors and returns; a thread writes them to a temporary file, flushes it to disk and
renames it. One at a time: a save that comes early waits for the one before it.
"""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

FORMAT = 1  # of what a checkpoint holds; newer ones are refused
STAMP = "pipeline"
AVERAGED = "averaged"  # the averaged weights by the names of state_dict, where a run keeps them
TEMPORARY = ".*.ckpt.*.tmp"  # what a file is called until it is whole


class CheckpointError(Exception):
    """A checkpoint that cannot be gone on from: the message names file, rule and way out."""


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to the disk. failure: why the last write failed, or "". waited: seconds that training stood.

    identity: what the run is, by key, which goes into each file.
    """

    def __init__(self, identity: Mapping[str, Any] | None = None) -> None:
        self.identity = dict(identity or {})
        self.failure, self.waited = "", 0.0
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,
        storage_options: Callable[[], None] | None = None,
    ) -> None:
        """storage_options: run after a successful write, in its thread (Lightning hands it through untouched)."""
        self.finish()
        began = time.perf_counter()
        copy = _copied(checkpoint)
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._writer.submit(self._write, copy, Path(path), storage_options)
        self.waited += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until what was saved is on disk; `failure` says if it is not."""
        if self._writing is not None:
            began = time.perf_counter()
            self._writing.result()
            self._writing = None
            self.waited += time.perf_counter() - began

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return checkpoint

    def teardown(self) -> None:
        self.finish()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _write(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], None] | None) -> None:
        try:
            write_checkpoint(checkpoint, path, self.identity)
            if then is not None:
                then()
            self.failure = ""
        except OSError as error:  # a full disk, say: training goes on, the last good one stays
            self.failure = f"{path.name}: {error.strerror or error}"


def write_checkpoint(checkpoint: dict[str, Any], path: Path, identity: Mapping[str, Any] | None = None) -> None:
    """Write it whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=0) as raw:
            file = _Watched(raw)
            try:
                torch.save({**checkpoint, STAMP: {"format": FORMAT, "identity": dict(identity or {})}}, file)
            except RuntimeError:
                if file.error is None:
                    raise
                raise file.error from None
            os.fsync(raw.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


class _Watched(io.BufferedWriter):
    """A file that remembers why it could not be written: torch's zip writer says something else instead."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            written = super().write(content)
            self.flush()
            return written
        except OSError as error:
            self.error = error
            raise


def weights_of(checkpoint: Mapping[str, Any], *, averaged: bool | None = None) -> dict[str, Tensor]:
    """A checkpoint's weights and statistics by name: the averaged ones, where there are some, or the trained ones.

    averaged: True or False asks for these or those. Statistics are those of the run's last validation before it, so
    estimate them anew for another step's checkpoint. Raises CheckpointError where averaged ones are asked for in vain.
    """
    found: dict[str, Tensor] | None = checkpoint.get(AVERAGED)
    if averaged and found is None:
        raise CheckpointError("the checkpoint holds no averaged weights, as its run had averaging.decay = 0; take the "
                              "trained ones")  # fmt: skip
    trained: dict[str, Tensor] = checkpoint["state_dict"]
    return trained if found is None or averaged is False else found


def damage(path: Path, identity: Mapping[str, Any] | None = None) -> str:
    """Why a file is no whole checkpoint of the run that identity describes, or "".

    Every byte is read and compared with its checksum. Raises CheckpointError for one of a newer format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            return f"{broken} in it is damaged"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return f"torn or damaged ({str(error).splitlines()[0]})"
    except Exception:  # torch's unpickler has many ways to refuse what is not data
        return "holds more than tensors and plain values, and is not loaded"
    if not isinstance(content, dict) or STAMP not in content or "state_dict" not in content:
        return "not written by this program"
    if content[STAMP]["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content[STAMP]['format']}, this version reads up to {FORMAT}; go on with the newer "
            "version that wrote it"
        )
    here, there = identity or {}, content[STAMP].get("identity", {})
    unlike = [key for key in here if key in there and here[key] != there[key]]
    if unlike:
        return f"of another run ({', '.join(f'{key} = {there[key]!r}, here {here[key]!r}' for key in unlike[:3])})"
    return ""


def _copied(value: Any) -> Any:
    """The same with tensors of its own on the CPU: the training changes those of the checkpoint meanwhile."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copied(item) for item in value)
    return value
