"""A directory as a cache's origin: the shards of a slow file system, each read once a node and from end to end."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.data.remote import Body, Stopped, below
from pipeline.data.shards import DataError

_CHUNK = 4 * 1024 * 1024  # bytes; file systems over a network serve large reads best


@dataclass(frozen=True)
class Directory:
    """Files below a directory. A fault of reading is final: there is another way to the bytes, the file itself."""

    root: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", str(Path(self.root).resolve()).rstrip("/"))

    def url(self, name: str) -> str:
        """The path of a file. Raises DataError for a name that leaves the root."""
        return below(self.root, name)

    def size(self, name: str, stop: threading.Event | None = None) -> int:
        """Bytes of a file."""
        with _named(self.url(name)):
            return Path(self.url(name)).stat().st_size

    def version(self, name: str) -> str:
        """Size, inode and time of the last change."""
        with _named(self.url(name)):
            return _version(Path(self.url(name)).stat())

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file."""
        with _named(self.url(name)), Path(self.url(name)).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)

    def open(self, name: str, start: int = 0, stop: threading.Event | None = None) -> Body:
        """A file from byte `start` on; closed by its reader. stop, once set, ends it with Stopped."""
        path = self.url(name)
        with _named(path):
            file = Path(path).open("rb", buffering=0)  # noqa: SIM115  (its reader's to close)
            facts = os.fstat(file.fileno())
        chunks = _chunks(file, path, start, stop)
        next(chunks)  # so that closing it closes the file
        return Body(facts.st_size, _version(facts), chunks)


def _chunks(file: BinaryIO, path: str, start: int, stop: threading.Event | None) -> Generator[bytes, None, None]:
    with file, _named(path):
        yield b""
        file.seek(start)
        while chunk := file.read(_CHUNK):
            if stop is not None and stop.is_set():
                raise Stopped
            yield chunk


def _version(facts: os.stat_result) -> str:
    return f"{facts.st_size} {facts.st_ino} {facts.st_mtime_ns}"


@contextmanager
def _named(path: str) -> Iterator[None]:
    """A fault of the file system becomes a line; else the cache would take it for one of its own."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; see the file, its owner and mode, and its file system") from None
