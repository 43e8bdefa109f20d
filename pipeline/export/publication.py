"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.export import graph, layout_file, weights
from pipeline.export.description import ExportError, parse

CARD, MARK = "README.md", "model.json"  # each export holds both
_FILES = {CARD, MARK, weights.FILE, graph.FILE, "model.onnx", layout_file.TABLE}  # onnx_file.FILE needs its libraries


def check_free(directory: Path, *, force: bool) -> None:
    """Raises ExportError where something is there already that is not to be replaced, as whole directories are."""
    directory = directory.resolve()
    if Path.cwd().is_relative_to(directory):
        raise ExportError(
            f"{directory} holds the directory that you are in, and an export replaces its own as a whole; choose "
            "another place with --output DIR"
        )
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if fault := _no_export(directory):
        raise ExportError(f"{directory} is there and no export: {fault}; choose another place with --output DIR")
    if not force:
        raise ExportError(f"{directory} holds an export; replace it with --force, or choose --output DIR")


def _no_export(directory: Path) -> str:
    """Why it is none, or ""."""
    if not directory.is_dir():
        return "it is no directory"
    for path in sorted(directory.iterdir()):
        if path.name not in _FILES or path.is_symlink() or not path.is_file():
            return f"{path.name} is not of one"
    try:
        parse((directory / MARK).read_text(encoding="utf-8"), MARK)
    except OSError:
        return f"it holds no {MARK}"
    except (UnicodeDecodeError, ExportError):
        return f"{MARK} is not of one"
    return ""


@contextmanager
def published(directory: Path, *, force: bool) -> Iterator[Path]:
    """A temporary directory beside it, which takes its name if what runs inside ends well. Raises as check_free."""
    check_free(directory, force=force)
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        check_free(directory, force=force)  # what has come there meanwhile
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
