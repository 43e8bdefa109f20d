"""A run's directory: can it be written and locked, is there room, and what of a run that it holds already."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config import Config, ConfigError
from pipeline.doctor.findings import Finding, counted, fault, of_message, ok, warning
from pipeline.doctor.machine import existing
from pipeline.launch.lock import LOCK, STALE_AFTER, Holder, LockedError, locked
from pipeline.launch.plan import CONFIG, RECORD, STARTED, newest_step, read_record, refuse_crash_loop
from pipeline.training.checkpoint import newest
from pipeline.training.checkpoint_io import CheckpointError

_ELSEWHERE = "choose a directory that can be written: run.dir"


def check_writable(directory: Path) -> Iterator[Finding]:
    """A real file and a real lock, in a directory of their own that goes again."""
    place = existing(directory)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as made:
            (Path(made) / "file").write_bytes(bytes(1024))
            yield ok("write", f"{directory} can be written" if place == directory.absolute()
                     else f"{directory} can be made")  # fmt: skip
            yield from check_lock(Path(made) / "run")
    except OSError as error:
        yield fault("write", f"run.dir: {place} cannot be written: {error.strerror}", _ELSEWHERE)


def check_lock(directory: Path) -> Iterator[Finding]:
    """Of two that want the same directory the second is refused."""
    try:
        with locked(directory, say=_quiet):
            try:
                with locked(directory, say=_quiet):
                    yield fault("lock", "two locks on one directory were had at once: two starts of a run would mix",
                                "choose another file system for run.dir")  # fmt: skip
            except LockedError:
                yield ok("lock", "a second start of a run would be refused")
    except OSError as error:
        yield fault("lock", f"no lock can be made there: {error.strerror}", "choose another file system for run.dir")


def _quiet(text: str) -> None:
    """Nothing."""


def check_holder(directory: Path) -> Iterator[Finding]:
    """Whether a run is going on in it. The lock is looked at, not taken: the run may be about to start."""
    path = directory / LOCK
    try:
        holder, touched = Holder(**json.loads(path.read_text())), path.stat().st_mtime
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        yield fault("lock", f"{path} cannot be read", "remove it if no process of that run is alive")
        return
    gone = holder.is_gone()
    if gone is None:
        gone = time.time() - touched > STALE_AFTER  # of another machine: an hour-old lock tells enough
    if gone:
        yield ok("holder", f"process {holder.process} on {holder.host} held it and is gone; its lock gives way")
    else:
        yield fault("holder", f"{directory} belongs to a run that is going on: process {holder.process} on "
                    f"{holder.host}", "wait for it or stop it, or give another run.id")  # fmt: skip


def checkpoint_bytes(model: nn.Module, element: int) -> int:
    """Parameters with their momenta, and buffers. element: bytes of a number; the model may be on the meta device."""
    numbers = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return element * (numbers + sum(b.numel() for b in model.buffers()))


def check_space(directory: Path, size: int, keep: int) -> Iterator[Finding]:
    """Room for `keep` checkpoints, the best, and one being written; those that are there already have theirs."""
    try:
        status = os.statvfs(existing(directory))
    except OSError as error:
        yield fault("space", f"{existing(directory)}: {error.strerror}", _ELSEWHERE)
        return
    if not status.f_blocks:
        return  # no disk at all: that it cannot be written is said already
    free = status.f_bavail * status.f_frsize
    there = sum(path.stat().st_size for path in (directory / "checkpoints").glob("*.ckpt"))
    needed = max(0, size * (keep + 2) - there) + 50_000_000  # and journal, logs, W&B's segments
    text = (f"{free / 1e9:.3g} GB free; {keep} checkpoints, the best and one being written are {keep + 2} x "
            f"{size / 1e6:.3g} MB")  # fmt: skip
    if free < needed:
        yield fault("space", f"{text}: {needed / 1e9:.2g} GB are needed", "make room, choose another run.dir, or lower "
                    "trainer.keep_checkpoints")  # fmt: skip
    elif status.f_files and status.f_favail < 100:
        yield fault(
            "space", f"{text}, but only {status.f_favail} more files", "remove files, or choose another run.dir"
        )
    elif free < 3 * needed:
        yield warning("space", f"{text}: that is tight", "make room, or choose another run.dir")
    else:
        yield ok("space", text)


def check_run(config: Config, differences: Sequence[str]) -> Iterator[Finding]:
    """What a directory of that id holds. differences: from the run that began there, if one did."""
    directory = config.directory
    if not (directory / CONFIG).exists():
        if directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
            yield fault("run", f"{directory} holds no run but other files", "choose another run.id or run.dir")
        return
    if differences:
        shown = ", ".join(differences[:5]) + (f" and {len(differences) - 5} more" if len(differences) > 5 else "")
        yield fault("run", f"run.id = {config.run.id} is another run: {shown}", "choose a new run.id, or these values")
    if not (directory / RECORD).exists():
        if (directory / STARTED).exists():
            yield warning("run", f"{directory} lacks {RECORD}: a start makes another W&B run", "bring it back")
        return
    try:
        record = read_record(directory)
    except ConfigError as error:
        yield of_message("run", error)
        return
    last = record.starts[-1] if record.starts else {}
    ended = last.get("ended", "goes on, or was killed")
    step = newest_step(directory)
    yield ok(
        "run",
        f"{config.run.id}: {counted(len(record.starts), 'start')}, the last {ended}; newest checkpoint: step {step}",
    )
    try:
        refuse_crash_loop(config, record, step)
    except ConfigError as error:
        yield of_message("crash loop", error)


def check_checkpoints(folder: Path, identity: Mapping[str, Any]) -> Iterator[Finding]:
    """The checkpoint from which a start would go on: every byte is read."""
    try:
        path, faults = newest(folder, identity)
    except CheckpointError as error:
        yield of_message("checkpoint", error)
        return
    for bad, why in faults.items():
        yield warning("checkpoint", f"{bad.name} is {why}", f"a start sets it aside and goes on from "
                      f"{path.name if path else 'the beginning'}; bring a sound copy if there is one")  # fmt: skip
    if path is not None:
        yield ok("checkpoint", f"a start goes on from {path.name}, which is whole")
