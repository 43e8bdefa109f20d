"""Whole shards on the disk of a node, shared by all its processes: of a server, or of a slow file system.

    DIR/<hash of the URL>-<hash of the content>-000000.tar    a shard, complete and verified; mtime: its last use
    DIR/<hash of the URL>.partial                             a shard on its way, continued by whoever comes next
    DIR/<hash of the URL>.lock                                held by the process that downloads it: the bytes it needs
    DIR/<hash of the URL>.different                           which version of a file is not what the manifest says
    DIR/.lock                                                 held while room is made

Locks are flock's, which the kernel releases when a process dies. A shard is removed while others may read it: an open
file stays readable on Linux until it is closed, and `open` fetches a shard again that went before it could be opened.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.data.remote import CHUNK, Body, RangeIgnored, Stopped, Unavailable, pause, say_again
from pipeline.data.shards import DataError

SHARD = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-.+")
PARTIAL = re.compile(r"[0-9a-f]{16}\.partial")
FULL = (errno.ENOSPC, errno.EDQUOT)
POLL = 0.1  # seconds between two looks whether others have made room


class Origin(Protocol):
    """Where shards come from: Remote, or Directory."""

    def url(self, name: str) -> str:
        """Its full name. Raises DataError for one that leaves the root."""

    def size(self, name: str, stop: threading.Event | None = None) -> int:
        """Bytes of a file."""

    def version(self, name: str) -> str:
        """What changes when the file does; "" where that is not known for nothing."""

    def open(self, name: str, start: int = 0, stop: threading.Event | None = None) -> Body:
        """One attempt at a file from byte `start` on. Raises Unavailable if another is worth it, or Stopped."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file."""


class Different(DataError):
    """What the origin has is not what the manifest says."""


class _Busy(Exception):
    """Another process downloads it, or has been promised the room."""


@dataclass(frozen=True)
class ShardCache:
    """Shards of one origin, under names that differ for any two URLs. Several origins may share a directory."""

    origin: Origin
    directory: Path
    limit: int = 0  # bytes of shards and partials together; 0 = none
    attempts: int = 8  # in a row that bring a shard no byte further
    wait: float = 0.5  # seconds before the second attempt, doubled with each

    def fetch(self, name: str, *, size: int | None = None, sha256: str = "") -> Path:
        """The path of a shard once it lies complete in the cache, downloaded by at most one process of the node.

        size and sha256 are those of the manifest; where they are not known, what the server announces is taken.
        The hash is that of the download: a shard already there is known by its name and length alone.
        Raises DataError for a shard that cannot be had, or is not what the manifest says.
        """
        path = self._present(name, size, sha256)  # most often, and without a lock
        if path is None:
            with self._holding(self._named(name, "lock")) as lock:
                path = self._present(name, size, sha256) or self._download(name, size, sha256, lock, None)
        return path

    def fetch_if_idle(
        self, name: str, *, size: int | None = None, sha256: str = "", stop: threading.Event | None = None
    ) -> bool:
        """Whether this call has brought the shard: not if it is there, or on its way, or the room is taken by others.

        stop, once set, ends it with Stopped; what came is kept.
        """
        if self._present(name, size, sha256):
            return False
        try:
            with self._holding(self._named(name, "lock"), block=False) as lock:
                if self._present(name, size, sha256):
                    return False
                self._download(name, size, sha256, lock, stop or threading.Event())
        except _Busy:
            return False
        return True

    def open(self, name: str, *, size: int | None = None, sha256: str = "") -> BinaryIO:
        """A shard, opened for reading, which no other process can take away again."""
        for _ in range(self.attempts):
            path = self.fetch(name, size=size, sha256=sha256)
            try:
                return path.open("rb")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._unusable(error) from None
        raise DataError(
            f"{self.origin.url(name)}: evicted {self.attempts} times before it could be opened; the limit of "
            f"{self.limit} bytes holds fewer shards than are read at once: raise it"
        )

    def use(self, name: str, *, size: int | None = None, sha256: str = "") -> bool:
        """Count a shard as used now, if it is there."""
        return self._present(name, size, sha256) is not None

    def used(self) -> int:
        """Bytes of shards in the directory, of this origin and of others."""
        total = 0
        for path in self.directory.glob("*"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size if SHARD.fullmatch(path.name) else 0
        return total

    def free(self) -> int:
        """Bytes left where the directory lies, or will lie."""
        return shutil.disk_usage(self._there()).free

    def refusal(self) -> str:
        """Why nothing can be written where the directory lies, or will lie; "" if it can."""
        try:
            with tempfile.TemporaryFile(dir=self._there()):
                return ""
        except OSError as error:
            return error.strerror or str(error)

    def shares_disk_with(self, path: Path) -> bool:
        """Whether the directory lies, or will lie, on the file system of a path."""
        return self._there().stat().st_dev == path.stat().st_dev

    def _there(self) -> Path:
        """The directory, or the nearest one above it that exists."""
        directory = self.directory.absolute()
        return next(path for path in (directory, *directory.parents) if path.exists())

    def forget(self, name: str) -> None:
        """Remove what the cache holds of a shard, so that it is downloaded anew."""
        with self._holding(self._named(name, "lock")):
            for path in self.directory.glob(f"{self._key(name)}-*"):
                path.unlink(missing_ok=True)

    def _named(self, name: str, kind: str) -> Path:
        return self.directory / f"{self._key(name)}.{kind}"

    def _key(self, name: str) -> str:
        return hashlib.blake2b(self.origin.url(name).encode(), digest_size=8).hexdigest()

    def _path(self, name: str, sha256: str) -> Path:
        # With the content's hash in its name, a shard that was replaced under the same URL is never taken for the new.
        return self.directory / f"{self._key(name)}-{sha256[:16]}-{name.rpartition('/')[2][-150:]}"

    def _present(self, name: str, size: int | None, sha256: str) -> Path | None:
        if sha256:
            found = [self._path(name, sha256)]
        else:
            found = [f for f in self.directory.glob(f"{self._key(name)}-*") if SHARD.fullmatch(f.name)]
        for path in found:
            with suppress(OSError):  # not there; or a directory of no use, as whoever locks it will find
                if size is None or size == path.stat().st_size:
                    _use(path)
                    return path
        return None

    @contextmanager
    def _holding(self, path: Path, *, block: bool = True) -> Iterator[int]:
        """A lock file, held. It goes with its last holder, so that none are left behind."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            while True:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
                    with suppress(FileNotFoundError):
                        if path.stat().st_ino == os.fstat(lock).st_ino:
                            os.ftruncate(lock, 0)  # what a dead process was promised
                            break
                except BlockingIOError:
                    os.close(lock)
                    raise _Busy from None
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)  # removed by its holder while we waited for it
        except OSError as error:
            raise self._unusable(error) from None
        try:
            yield lock
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)

    def _unusable(self, error: OSError) -> DataError:
        if error.errno in FULL:
            limit = f"a smaller limit than {self.limit} bytes" if self.limit else "a limit"
            return DataError(
                f"{self.directory}: {error.strerror}; free some space, set {limit} for the cache, or give it another "
                "directory"
            )
        return DataError(
            f"{self.directory}: {error.strerror}; give the cache a directory of its own that can be read and written"
        )

    def _download(self, name: str, size: int | None, sha256: str, lock: int, stop: threading.Event | None) -> Path:
        """stop: None if the caller waits for the shard, whatever it takes."""
        total = self.origin.size(name, stop) if size is None else size
        partial, different = self._named(name, "partial"), self._named(name, "different")
        version = f"{sha256} {known}" if sha256 and (known := self.origin.version(name)) else ""
        if version and _text(different) == version:
            raise Different(
                f"{self.origin.url(name)}: content differs from the manifest, as a copy of it did; bring the file "
                "back, or write the manifest again (of tars of others: `pipeline shards index`)"
            )
        try:
            self._make_room(name, total, lock, stop)
            self._check_space(total, partial)
            with partial.open("a+b") as file:
                try:
                    content = self._receive(name, file, total, sha256, stop or threading.Event())
                except Different:
                    partial.unlink()  # of no use to whoever comes next
                    if version:
                        with suppress(OSError):
                            different.write_text(version)
                    raise
                os.fsync(file.fileno())
            path = self._path(name, content)
            _use(partial)
            with self._holding(self.directory / ".lock"):  # or the shard and its promise would both be counted
                partial.replace(path)
                os.ftruncate(lock, 0)
            different.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in FULL:
                partial.unlink(missing_ok=True)
            raise self._unusable(error) from None
        return path

    def _receive(self, name: str, file: BinaryIO, total: int, sha256: str, stop: threading.Event) -> str:
        """Fill a partial up to `total` bytes; returns the hash of its content."""
        url = self.origin.url(name)
        part = _Partial(file, stop)
        if part.length > total or not sha256:
            part.restart()  # where no hash tells, what a dead process left may be of an older file
        failures, furthest, restarted = 0, part.length, False
        while True:
            try:
                if part.length < total or not total:
                    self._append_body(name, part, total, bool(sha256), stop)
            except RangeIgnored:
                part.restart()
            except Unavailable as fault:
                failures = 1 if part.length > furthest else failures + 1
                furthest = max(furthest, part.length)
                if failures >= self.attempts:
                    raise Unavailable(
                        f"{fault} ({failures} attempts in a row, at byte {part.length} of {total}); check the server "
                        "and the network: what came is kept, and the next attempt goes on from there"
                    ) from None
                seconds = pause(url, failures, self.wait)
                say_again(fault, failures, self.attempts, seconds)
                if stop.wait(seconds):
                    raise Stopped from None
            else:
                content = part.sha256()
                if content == (sha256 or content):
                    return content
                if restarted or not part.joined:
                    raise Different(
                        f"{url}: content differs from the manifest (sha256 {content[:16]}, not {sha256[:16]}); bring "
                        "the file back, or write the manifest again (of tars of others: `pipeline shards index`)"
                    )
                restarted = True
                part.restart()

    def _append_body(self, name: str, part: _Partial, total: int, hashed: bool, stop: threading.Event) -> None:
        """One attempt at the rest of a shard. hashed: a wrong joint will be found."""
        url = self.origin.url(name)
        with closing(self.origin.open(name, part.length, stop)) as body:
            if body.size != total:
                raise Different(
                    f"{url}: its length of {body.size} bytes differs from the {total} expected; bring the file back, "
                    "or write the manifest again (of tars of others: `pipeline shards index`)"
                )
            if part.length and not hashed and (body.tag != part.tag or not body.tag):
                raise RangeIgnored(f"{url}: nothing says that it still is the same file")
            part.joined, part.tag = part.length > 0, body.tag
            for chunk in body.chunks:
                if part.length + len(chunk) > total:
                    raise RangeIgnored(f"{url}: more bytes than were announced")
                part.append(chunk)
        if part.length < total:
            raise Unavailable(f"{url}: the body broke off")

    def _make_room(self, name: str, total: int, lock: int, stop: threading.Event | None) -> None:
        """Evict until `total` more bytes fit, and promise them to ourselves: the number stands in our lock."""
        if not self.limit:
            return
        if total > self.limit:
            raise DataError(
                f"{self.origin.url(name)}: its {total} bytes exceed the cache's limit of {self.limit}; raise the limit"
            )
        while True:
            with self._holding(self.directory / ".lock"):
                if self._evict(self.limit - total, self._key(name)):
                    os.pwrite(lock, str(total).encode(), 0)
                    return
            # The rest is promised to downloads of others, which end, or fail, within their own time limits.
            if stop is not None:
                raise _Busy
            time.sleep(POLL)

    def _check_space(self, total: int, partial: Path) -> None:
        """Raises OSError before the first byte of what the disk has no room for: else it would be filled in vain."""
        disk, here = shutil.disk_usage(self.directory), partial.stat().st_size if partial.exists() else 0
        if disk.total and disk.free < total - here:  # some file systems say 0 of 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _evict(self, allowed: int, own: str) -> bool:
        """Remove the least recently used until all but the shard `own` takes `allowed` bytes; False if it cannot."""
        with os.scandir(self.directory) as files:
            names = [file.name for file in files]
        promised = {
            key: bytes_promised
            for key, _, kind in (name.partition(".") for name in names)
            if kind == "lock" and key not in ("", own)
            if (bytes_promised := _promised(self.directory / f"{key}.lock")) is not None
        }
        used, entries = 0, []
        for name in names:
            key, path = name[:16], self.directory / name
            with suppress(FileNotFoundError):
                facts = path.stat()
                if PARTIAL.fullmatch(name) and key in promised:
                    promised[key] = max(promised[key], facts.st_size)
                elif SHARD.fullmatch(name) or (PARTIAL.fullmatch(name) and key != own):
                    entries.append((facts.st_mtime_ns, facts.st_size, path))
                    used += facts.st_size
        allowed -= sum(promised.values())
        if allowed < 0:
            return False
        for _, size, path in sorted(entries):
            if used <= allowed:
                break
            path.unlink(missing_ok=True)
            used -= size
        return True


def _promised(lock: Path) -> int | None:
    """Bytes that the holder of a lock file needs in all; None if nobody holds it."""
    try:
        file = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(file, 20, 0) or 0)
    finally:
        os.close(file)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _use(path: Path) -> None:
    now = time.time_ns()  # the file system's own clock has steps of milliseconds, within which uses would tie
    with suppress(PermissionError):  # another user's shard: its place among the least recently used stays
        os.utime(path, ns=(now, now))


class _Partial:
    """A file that grows, and the hash of what is in it. joined: of several bodies; tag: the last one's."""

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self.file, self.length, self._hash = file, 0, hashlib.sha256()
        file.seek(0)
        while chunk := file.read(16 * CHUNK):
            if stop.is_set():
                raise Stopped
            self._count(chunk)
        self.joined, self.tag = self.length > 0, ""

    def append(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.file.flush()  # a killed process leaves all it has counted
        self._count(chunk)

    def restart(self) -> None:
        self.file.truncate(0)
        self.length, self._hash = 0, hashlib.sha256()
        self.joined, self.tag = False, ""

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _count(self, chunk: bytes) -> None:
        self.length += len(chunk)
        self._hash.update(chunk)
