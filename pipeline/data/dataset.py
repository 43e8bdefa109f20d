"""A data set, wherever it lies: packed here, somebody's tars, or either behind http(s), s3 or gs.

packed        ROOT/dataset.json is there: read it
foreign       tars alone: indexed once, into ROOT/.pipeline or, where ROOT is read-only, into the cache
remote        manifest and tables are fetched into the cache, shards when they are needed
staged        packed or foreign on a slow file system: shards, too, are copied into the cache when they are needed
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pipeline.data.cache import ShardCache
from pipeline.data.directory import Directory
from pipeline.data.discovery import INFO, find_shards
from pipeline.data.indexing import IndexJob, Progress, index_dataset
from pipeline.data.remote import Remote, check_location, is_remote
from pipeline.data.shards import (
    MANIFEST,
    DataError,
    Manifest,
    ShardEntry,
    file_sha256,
    parse_manifest,
    read_index,
    read_manifest,
    write_atomically,
)
from pipeline.data.split import Split, open_split, table_path, write_table

_BESIDE = ".pipeline"
_CONTACTS = 3  # tries within two seconds, for a host that somebody has just typed
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a data set lies. train, val: brace patterns or globs below root; "" = by manifest, or by name."""

    root: str  # a directory, or an http(s), s3 or gs URL
    train: str = ""
    val: str = ""
    cache: str = ""  # directory for shards and for indexes of read-only roots, as $TMPDIR/p; "" = ~/.cache/pipeline
    cache_bytes: int = 0  # limit on shards kept there; 0 = none
    stage: bool = False  # shards of a directory go through the cache, too

    @property
    def cache_directory(self) -> Path:
        """Where the cache lies on this node. Raises DataError where it is named by a variable that is not set here."""
        if not self.cache:
            return _home_cache()
        if self.unset_variables:
            raise DataError(self.unset_variables)
        return Path(os.path.expandvars(self.cache)).expanduser()

    @property
    def unset_variables(self) -> str:
        """Why there is no cache here: a variable in its name is not set, or empty. "" if there is one."""
        names = [braced or plain for braced, plain in _VARIABLE.findall(self.cache)]
        unset = [name for name in dict.fromkeys(names) if not os.environ.get(name)]
        if not unset:
            return ""
        return (
            f"data.cache = {self.cache}: {' and '.join(unset)} {'is' if len(unset) == 1 else 'are'} not set on this "
            "node; set what is missing, or name the directory without it"
        )

    @property
    def index_directory(self) -> Path:
        """Where an index goes that cannot lie beside its shards: not where they are staged, which goes with the job."""
        cache = _home_cache() if self.stage and not self.is_remote else self.cache_directory
        return cache / "indexes" / self.name

    @property
    def is_remote(self) -> bool:
        return is_remote(self.root)

    @property
    def is_cached(self) -> bool:
        """Whether shards go through the cache."""
        return self.is_remote or self.stage

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

    @property
    def is_staged(self) -> bool:
        """Whether the cache holds copies of what can be read where it lies."""
        return self.cache is not None and not self.location.is_remote

    def path(self, entry: ShardEntry) -> Path:
        """The shard: fetched, if it is remote; where it lies, if it is staged."""
        if self.cache is None or self.is_staged:
            return Path(self.location.root) / entry.shard
        return self.cache.fetch(entry.shard, size=entry.bytes, sha256=entry.sha256)

    def open(self, entry: ShardEntry) -> BinaryIO:
        """The shard, to be read at any offset. Raises DataError.

        A shard that cannot be staged (a full disk, a copy that is not what the manifest says) is read where it lies:
        what a run without staging would bear does not end one with it.
        """
        if self.cache is not None:
            try:
                return self.cache.open(entry.shard, size=entry.bytes, sha256=entry.sha256)
            except DataError:
                if not self.is_staged:
                    raise  # else read_ahead.py says it: once a node, not in each of its processes
        return self.open_original(entry)

    def open_original(self, entry: ShardEntry) -> BinaryIO:
        """The shard of a directory where it lies. Raises DataError."""
        path = Path(self.location.root) / entry.shard
        try:
            return path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; it was there at the start") from None

    def streaming(self, window: int) -> list[str]:
        """For whom it may concern at the start: where shards come from, and are copied to. window: 0 = all."""
        if self.cache is None:
            return []
        cache, train = self.cache, self.manifest.splits["train"]
        entries = [entry for entries in self.manifest.splits.values() for entry in entries]
        total = sum(entry.bytes for entry in entries)
        here = sum(e.bytes for e in entries if cache.use(e.shard, size=e.bytes, sha256=e.sha256))
        bound = f"{cache.limit / 1e9:.3g} GB at most" if cache.limit else "all of them"
        verb = "staging" if self.is_staged else "streaming"
        lines = [
            f"{verb} {self.location.root}: {len(entries)} shards, {total / 1e9:.3g} GB, {here / 1e9:.3g} GB of it here "
            f"already; {cache.directory} keeps {bound}"
        ]
        if self.is_staged and (refusal := cache.refusal()):
            lines.append(f"{cache.directory} cannot be written ({refusal}): what is not here is read where it lies; "
                         "give another directory, data.cache")  # fmt: skip
            return lines
        if here < total and not 0 < window < len(train):
            lines.append(f"data.window = {window} shuffles over all {len(train)} training shards: the first step waits "
                         "for most of them; a smaller one, in a new run, for as many as it says")  # fmt: skip
        if self.is_staged and cache.shares_disk_with(Path(self.location.root)):
            lines.append(f"{cache.directory} lies on the file system of {self.location.root}, so that staging gains "
                         "nothing; give a disk of the node, data.cache")  # fmt: skip
        coming = min(total - here, max(0, cache.limit - cache.used())) if cache.limit else total - here
        if coming > (free := cache.free()):
            rest = ": what finds no room is read where it lies" if self.is_staged else ""
            lines.append(f"{cache.directory} has {free / 1e9:.3g} GB free, and {coming / 1e9:.3g} GB are to come{rest};"
                         " give another directory, data.cache, or a limit, data.cache_gb with data.window")  # fmt: skip
        return lines

    def check_shards(self) -> None:
        """Raises DataError for a local shard that is missing, not indexed, or of another size than it was."""
        if self.location.is_remote:
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
    patient: bool = True,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> Dataset:
    """The data set at a location; indexed, or its manifest fetched, where that is still to be done. Raises DataError.

    again: index foreign shards anew. patient: try a host at which nobody answers for a minute, not for two seconds.
    Of several processes that come at once, one indexes and the others wait.
    """
    check_location(location.root)
    if location.is_remote:
        return _open_remote(location, workers, again, patient, progress, say)
    root = Path(location.root)
    cache = _shard_cache(location) if location.stage else None
    if (root / MANIFEST).exists() and not (location.train or location.val):
        if again:
            _rebuild_tables(root, say)
        return Dataset(location, root, read_manifest(root), cache)
    if not root.is_dir():
        read_manifest(root)  # says what is wrong
    directory = _index_directory(location, root)
    if (directory / MANIFEST).exists() and not again:
        return Dataset(location, directory, read_manifest(directory), cache)
    with alone(directory):
        if again or not (directory / MANIFEST).exists():
            splits, stated = _found(location)
            read = partial(_local, str(root))
            jobs = [
                IndexJob(split, shard, directory, read, root / shard)
                for split, shards in splits.items() for shard in shards
            ]  # fmt: skip
            _index(jobs, directory, again, stated, workers, progress, say, str(root))
    return Dataset(location, directory, read_manifest(directory), cache)


def awaiting_index(location: Location) -> int:
    """How many shards of a local data set an `open_dataset` would index first; 0 = none. Raises DataError."""
    root = Path(location.root)
    packed = (root / MANIFEST).exists() and not (location.train or location.val)
    if location.is_remote or packed or not root.is_dir() or (_index_directory(location, root) / MANIFEST).exists():
        return 0
    return sum(len(shards) for shards in _found(location)[0].values())


def _open_remote(
    location: Location, workers: int, again: bool, patient: bool, progress: Progress, say: Callable[[str], None]
) -> Dataset:
    root = location.root.rstrip("/")
    remote = Remote(root) if patient else Remote(root, contacts=_CONTACTS)
    directory = location.index_directory
    cache = _shard_cache(location)
    published = not (location.train or location.val)
    with alone(directory):
        content = remote.read_if_there(MANIFEST) if published else None
        if content is not None:
            manifest, directory = _fetched_tables(remote, content, directory)
            return Dataset(location, directory, manifest, cache)
        if again or not (directory / MANIFEST).exists():
            info = remote.read_if_there(INFO) if published else None
            if published and info is None and not remote.has_listing:
                raise DataError(
                    f"{root} holds neither {MANIFEST} nor {INFO}, and HTTP has no listing; check the URL, or give "
                    "data.train and data.val as brace patterns of its shards"
                )
            listed = remote.names if info is None else list  # what _info.json names need not be listed
            splits, stated = find_shards(listed, root, train=location.train, val=location.val, info=info)
            jobs = [
                IndexJob(split, shard, directory, cache.open, None)
                for split, shards in splits.items() for shard in shards
            ]  # fmt: skip
            if again and (directory / MANIFEST).exists():
                for job in jobs:
                    cache.forget(job.shard)  # no hash would tell that the server has another by now
            _index(jobs, directory, again, stated, workers, progress, say, root)
    return Dataset(location, directory, read_manifest(directory), cache)


def _fetched_tables(remote: Remote, content: bytes, directory: Path) -> tuple[Manifest, Path]:
    """The manifest that the publisher gives, and where it lies with its tables, fetched as far as they are missing.

    Each version has a directory of its own: a run that began with the one before maps its tables still.
    """
    manifest = parse_manifest(content, remote.url(MANIFEST))
    directory = directory / hashlib.sha256(content).hexdigest()[:16]
    directory.mkdir(exist_ok=True)
    for split, sha256 in manifest.samples.items():
        path = table_path(directory, split)
        if not path.exists() or file_sha256(path) != sha256:
            ShardCache(remote, directory).fetch(path.name, sha256=sha256).replace(path)
    write_atomically(directory / MANIFEST, content)
    return manifest, directory


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
    if again and (directory / MANIFEST).exists():  # else it goes on where it was stopped
        shutil.rmtree(directory / "marks", ignore_errors=True)
    index_dataset(jobs, directory, stated=stated, workers=workers, progress=progress, say=say)
    shutil.rmtree(directory / "marks", ignore_errors=True)


def _found(location: Location) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Shards of a local root by split, and how many samples they are said to hold."""
    root = Path(location.root)
    info = (root / INFO).read_bytes() if (root / INFO).is_file() else None
    return find_shards(partial(_files, root), str(root), train=location.train, val=location.val, info=info)


def _rebuild_tables(root: Path, say: Callable[[str], None]) -> None:
    """The tables of a set that was packed here, from the indexes beside its shards, where one is lost or damaged."""
    manifest = read_manifest(root)
    for split, entries in manifest.splits.items():
        path = table_path(root, split)
        if not path.exists() or file_sha256(path) != manifest.samples[split]:
            if (
                write_table(root, split, [read_index(root / entry.shard) for entry in entries])
                != manifest.samples[split]
            ):
                raise DataError(f"{root}: the indexes of {split} are not those of {MANIFEST}; write the shards again")
            say(f"{path} is made anew from the indexes beside the shards")


def _index_directory(location: Location, root: Path) -> Path:
    """Beside the shards where that can be written, else in the cache."""
    patterns = hashlib.sha256(f"{location.train}\n{location.val}".encode()).hexdigest()[:16]
    beside = root / _BESIDE / (patterns if location.train or location.val else "")
    if (beside / MANIFEST).exists() or os.access(root, os.W_OK):
        return beside
    return location.index_directory


def _home_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipeline"


def _shard_cache(location: Location) -> ShardCache:
    origin = Remote(location.root) if location.is_remote else Directory(location.root)
    return ShardCache(origin, location.cache_directory / "shards", limit=location.cache_bytes)


def _local(root: str, shard: str) -> BinaryIO:
    path = Path(root) / shard
    if not path.is_file():
        raise DataError(f"{path} does not exist; bring the shard, or leave it out of the pattern")
    return path.open("rb")


def _files(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a directory, which is made if it is not there: others wait. Raises DataError where it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as error:  # no permission, a read-only or full disk, a file in the way
        raise DataError(f"{error.filename}: {error.strerror}; give a directory to write to, data.cache") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
