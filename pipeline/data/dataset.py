"""A data set, wherever it lies: packed here, somebody's tars, or either behind http(s), s3 or gs.

packed        ROOT/dataset.json is there: read it
foreign       tars alone: indexed once, into ROOT/.pipeline or, where ROOT is read-only, into the cache
remote        manifest and tables are fetched into the cache, shards when they are needed
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pipeline.data.cache import ShardCache
from pipeline.data.discovery import INFO, find_shards
from pipeline.data.indexing import IndexJob, Progress, index_dataset
from pipeline.data.remote import Remote, check_location, is_remote
from pipeline.data.shards import (
    MANIFEST,
    DataError,
    Manifest,
    ShardEntry,
    file_sha256,
    read_manifest,
    write_atomically,
)
from pipeline.data.split import Split, open_split, table_path

_BESIDE = ".pipeline"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a data set lies. train, val: brace patterns or globs below root; "" = by manifest, or by name."""

    root: str  # a directory, or an http(s), s3 or gs URL
    train: str = ""
    val: str = ""
    cache: str = ""  # directory for remote shards and for indexes of read-only roots; "" = ~/.cache/pipeline
    cache_bytes: int = 0  # limit on remote shards kept; 0 = none

    @property
    def cache_directory(self) -> Path:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(self.cache) if self.cache else home / "pipeline"

    @property
    def is_remote(self) -> bool:
        return is_remote(self.root)

    @property
    def name(self) -> str:
        """What tells this location from others."""
        return hashlib.sha256("\n".join((self.root.rstrip("/"), self.train, self.val)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set that can be read. directory: where its manifest and tables lie on this node. cache: of its shards."""

    location: Location
    directory: Path
    manifest: Manifest
    cache: ShardCache | None = None

    def split(self, name: str, num_classes: int = 0) -> Split:
        """One split; num_classes = 0: as many as the manifest names. Raises DataError."""
        classes = num_classes or len(self.manifest.classes)
        return open_split(self.location.root.rstrip("/"), self.directory, self.manifest, name, classes)

    def path(self, entry: ShardEntry) -> Path:
        """The shard on this node, fetched if need be."""
        if self.cache is None:
            return Path(self.location.root) / entry.shard
        return self.cache.fetch(entry.shard, size=entry.bytes, sha256=entry.sha256)

    def open(self, entry: ShardEntry) -> BinaryIO:
        """The shard, to be read at any offset. Raises DataError."""
        if self.cache is not None:
            return self.cache.open(entry.shard, size=entry.bytes, sha256=entry.sha256)
        try:
            return self.path(entry).open("rb")
        except OSError as error:
            raise DataError(f"{self.path(entry)}: {error.strerror}; it was there at the start") from None

    def check_shards(self) -> None:
        """Raises DataError for a local shard that is missing, not indexed, or of another size than it was."""
        if self.cache is not None:
            return
        root = Path(self.location.root)
        if self.directory != root:
            known = {entry.shard for entries in self.manifest.splits.values() for entry in entries}
            new = sorted({shard for shards in _found(self.location)[0].values() for shard in shards} - known)
            if new:
                raise DataError(
                    f"{root / new[0]}{f' and {len(new) - 1} more' if new[1:] else ''} came after {root} was indexed; "
                    f"run `pipeline shards index {root}`, or say which shards to use with data.train and data.val"
                )
        entries = [entry for entries in self.manifest.splits.values() for entry in entries]
        sizes = [_size(self.path(entry)) for entry in entries]
        missing = [entry.shard for entry, size in zip(entries, sizes, strict=True) if size is None]
        if missing:
            raise DataError(
                f"data.root = {self.location.root} lacks {missing[0]}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; bring the shards back, or write them again"
            )
        for entry, size in zip(entries, sizes, strict=True):
            if size != entry.bytes:
                renewed = (
                    "" if self.directory == root else f"; if it was changed on purpose, `pipeline shards index {root}`"
                )
                raise DataError(
                    f"{self.path(entry)} has {size} bytes, {MANIFEST} says {entry.bytes}; "
                    f"run `pipeline shards verify {root}`{renewed}"
                )


def open_dataset(
    location: Location,
    *,
    workers: int = 1,
    again: bool = False,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> Dataset:
    """The data set at a location; indexed, or its manifest fetched, where that is still to be done. Raises DataError.

    again: index foreign shards anew. Of several processes that come at once, one indexes and the others wait.
    """
    check_location(location.root)
    if location.is_remote:
        return _open_remote(location, workers, again, progress, say)
    root = Path(location.root)
    if (root / MANIFEST).exists() and not (location.train or location.val):
        return Dataset(location, root, read_manifest(root))
    if not root.is_dir():
        read_manifest(root)  # says what is wrong
    directory = _index_directory(location, root)
    if (directory / MANIFEST).exists() and not again:
        return Dataset(location, directory, read_manifest(directory))
    with _alone(directory):
        if again or not (directory / MANIFEST).exists():
            splits, stated = _found(location)
            fetch = partial(_local, str(root))
            jobs = [
                IndexJob(split, shard, _mark(directory, shard), fetch, root / shard)
                for split, shards in splits.items() for shard in shards
            ]  # fmt: skip
            _index(jobs, directory, again, stated, workers, progress, say, str(root))
    return Dataset(location, directory, read_manifest(directory))


def _open_remote(
    location: Location, workers: int, again: bool, progress: Progress, say: Callable[[str], None]
) -> Dataset:
    remote = Remote(location.root.rstrip("/"))
    directory = location.cache_directory / "indexes" / location.name
    cache = ShardCache(remote, location.cache_directory / "shards", limit=location.cache_bytes)
    with _alone(directory):
        if not (location.train or location.val) and remote.exists(MANIFEST):
            return Dataset(location, directory, _fetched_manifest(remote, directory), cache)
        if again or not (directory / MANIFEST).exists():
            info = remote.read(INFO) if not (location.train or location.val) and remote.exists(INFO) else None
            listed = remote.names if info is None else list  # what _info.json names need not be listed
            splits, stated = find_shards(listed, location.root, train=location.train, val=location.val, info=info)
            fetch = partial(_fetched, cache)
            jobs = [
                IndexJob(split, shard, _mark(directory, shard), fetch, None)
                for split, shards in splits.items() for shard in shards
            ]  # fmt: skip
            _index(jobs, directory, again, stated, workers, progress, say, location.root)
    return Dataset(location, directory, read_manifest(directory), cache)


def _fetched_manifest(remote: Remote, directory: Path) -> Manifest:
    """The manifest that the publisher gives, and its tables, as far as they are not here already."""
    write_atomically(directory / MANIFEST, remote.read(MANIFEST))
    manifest = read_manifest(directory)
    for split, sha256 in manifest.samples.items():
        path = table_path(directory, split)
        if not path.exists() or file_sha256(path) != sha256:
            write_atomically(path, remote.read(path.name))
    return manifest


def _index(
    jobs: list[IndexJob],
    directory: Path,
    again: bool,
    stated: dict[str, int],
    workers: int,
    progress: Progress,
    say: Callable[[str], None],
    where: str,
) -> None:
    say(f"indexing {len(jobs)} shards of {where} into {directory}, once")
    if again:
        shutil.rmtree(directory / "marks", ignore_errors=True)
    index_dataset(jobs, directory, stated=stated, workers=workers, progress=progress, say=say)
    shutil.rmtree(directory / "marks", ignore_errors=True)


def _found(location: Location) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Shards of a local root by split, and how many samples they are said to hold."""
    root = Path(location.root)
    info = (root / INFO).read_bytes() if (root / INFO).is_file() else None
    return find_shards(partial(_files, root), str(root), train=location.train, val=location.val, info=info)


def _index_directory(location: Location, root: Path) -> Path:
    """Beside the shards where that can be written, else in the cache."""
    patterns = hashlib.sha256(f"{location.train}\n{location.val}".encode()).hexdigest()[:16]
    beside = root / _BESIDE / (patterns if location.train or location.val else "")
    if (beside / MANIFEST).exists() or os.access(root, os.W_OK):
        return beside
    return location.cache_directory / "indexes" / location.name


def _mark(directory: Path, shard: str) -> Path:
    return directory / "marks" / shard.replace("/", "__")


def _local(root: str, shard: str) -> Path:
    path = Path(root) / shard
    if not path.is_file():
        raise DataError(f"{path} does not exist; bring the shard, or leave it out of the pattern")
    return path


def _fetched(cache: ShardCache, shard: str) -> Path:
    return cache.fetch(shard, size=None)


def _files(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except PermissionError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give a directory to write to, data.cache") from None
