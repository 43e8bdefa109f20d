"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.export.description import ExportError

MARK = "model.json"  # each of ours holds one


def check_free(directory: Path, *, force: bool) -> None:
    """Raises ExportError where something is there already that is not to be replaced."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir() or not (directory / MARK).is_file():
        raise ExportError(f"{directory} is there and no export; choose another place with --output DIR")
    if not force:
        raise ExportError(f"{directory} holds an export; replace it with --force, or choose --output DIR")


@contextmanager
def published(directory: Path, *, force: bool) -> Iterator[Path]:
    """A temporary directory beside it, which takes its name if what runs inside ends well. Raises as check_free."""
    check_free(directory, force=force)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(old, ignore_errors=True)


def _flush(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
