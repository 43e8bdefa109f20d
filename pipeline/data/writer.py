"""Packing a source into shards: parallel, resumable, atomic, and the same bytes for the same input.

Samples are permuted over a whole split before they are cut into shards, so that no shard is sorted
by class. A shard is written under a temporary name and renamed; its index follows, and only a shard
with its index counts as done. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from webdataset import TarWriter

from pipeline.data.decode import DecodeError, image_type
from pipeline.data.encode import Encoding, encode, encoding
from pipeline.data.indexing import Progress, index_shard
from pipeline.data.keyed_random import mixed, permutation
from pipeline.data.pool import completed
from pipeline.data.shards import (
    MANIFEST,
    ClassName,
    DataError,
    Index,
    Manifest,
    ShardEntry,
    file_sha256,
    index_path,
    read_index,
    read_manifest,
    write_atomically,
    write_index,
    write_manifest,
)
from pipeline.data.source import Sample, Source
from pipeline.data.sources import DIGITS, digits, open_source, read
from pipeline.data.split import table_path, write_table
from pipeline.data.spool import remove_spool, spool
from pipeline.data.tars import dali_index


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to be written."""

    path: str
    split: str
    samples: list[Sample]
    classes: list[ClassName]
    plan: str
    encoding: Encoding | None


def write_shards(
    location: str,
    root: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    seed: int = 0,
    holdout: float = 0.0,
    shorter_side: int | None = None,
    quality: int | None = None,
    only: tuple[str, ...] = (),
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Pack the source at `location` (see sources.open_source) into root; goes on where an earlier call stopped.

    shorter_side, quality: re-encode larger images (see encode.py); None = every image keeps its bytes. only: splits
    to be packed; none = all.
    Raises DataError for a source that cannot be packed, or a root that holds another data set.
    """
    if samples_per_shard < 1:
        raise DataError(f"--samples-per-shard {samples_per_shard} must be at least 1; 1000 is usual for photographs")
    wanted = encoding(shorter_side, quality)
    if root.is_file():
        raise DataError(f"{root} is a file; give a directory for the shards")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}; give a directory that can be written") from None
    source = _digits_source(root) if location == DIGITS else open_source(location, holdout)
    for remark in source.remarks:
        say(remark)
    if only:
        source = replace(source, splits={name: samples for name, samples in source.splits.items() if name in only})
    try:
        jobs = list(_jobs(source, root, samples_per_shard, seed, wanted))
        plan = hashlib.sha256("".join(job.plan for job in jobs).encode()).hexdigest()
        if (root / MANIFEST).exists():
            manifest = read_manifest(root)
            if manifest.plan != plan:
                raise DataError(f"{root} holds another data set; give an empty directory, or remove that one")
            if all(_is_done(job) for job in jobs) and all(
                table_path(root, split).is_file() and file_sha256(table_path(root, split)) == sha256
                for split, sha256 in manifest.samples.items()
            ):
                remove_spool(root)
                return manifest
        for leftover in root.glob(".*.tmp"):
            leftover.unlink()
        if source.tables:
            jobs = _spooled(jobs, source, root, workers, progress, say)
        _write_all(jobs, workers, progress)
        manifest = _manifest(root, jobs, source.classes, plan)
        remove_spool(root)
        return manifest
    finally:
        if location == DIGITS:
            _digits_file(root).unlink(missing_ok=True)


def _jobs(source: Source, root: Path, samples_per_shard: int, seed: int, wanted: Encoding | None) -> Iterator[Job]:
    # None for plain copies of files, whose plans are those of older versions. Rows have no length before they are read.
    settings: list[object] = [asdict(wanted)] if wanted else []
    settings += [table.fingerprint for table in source.tables]
    for number, (split, samples) in enumerate(sorted(source.splits.items())):
        _check_keys(samples)
        order = permutation(len(samples), mixed(seed, number))
        for shard, first in enumerate(range(0, len(samples), samples_per_shard)):
            chosen = [samples[i] for i in order[first : first + samples_per_shard]]
            path = root / f"{split}-{shard:06d}.tar"
            facts = [[s.name, s.label, s.length] for s in chosen]
            content = json.dumps([path.name, facts, [[c.id, c.name] for c in source.classes], *settings])
            plan = hashlib.sha256(content.encode()).hexdigest()
            yield Job(str(path), split, chosen, source.classes, plan, wanted)


def _spooled(
    jobs: list[Job], source: Source, root: Path, workers: int, progress: Progress, say: Callable[[str], None]
) -> list[Job]:
    """The same jobs with the samples of those still to be done where they can be read."""
    waiting = [job for job in jobs if not _is_done(job)]
    needed = {sample.file for job in waiting for sample in job.samples}
    find = spool([table for table in source.tables if table.path in needed], root, workers, progress, say)
    found = {job.path: replace(job, samples=[find(sample) for sample in job.samples]) for job in waiting}
    return [found.get(job.path, job) for job in jobs]


def _write_all(jobs: list[Job], workers: int, progress: Progress) -> None:
    total = sum(len(job.samples) for job in jobs)
    waiting = [job for job in jobs if not _is_done(job)]
    done = total - sum(len(job.samples) for job in waiting)
    progress(done, total)
    with closing(completed(_write_shard, waiting, workers)) as counts:
        for count in counts:
            done += count
            progress(done, total)


def _is_done(job: Job) -> bool:
    path = Path(job.path)
    try:
        index = read_index(path)
    except DataError:
        return False
    if index.plan != job.plan:
        raise DataError(
            f"{path} was written from another source or with other settings; give an empty directory, or remove it"
        )
    return path.exists() and path.stat().st_size == index.bytes


def _write_shard(job: Job) -> int:
    """Write one tar and its index; returns the number of images."""
    path = Path(job.path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    archives: dict[str, zipfile.ZipFile] = {}
    try:
        with temporary.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="pipeline", group="pipeline") as writer:
                for sample in job.samples:
                    writer.write(_record(sample, job.classes, read(sample, archives), job.encoding))
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as written:
            index, samples = index_shard(written, path.name, job.plan)
        index_path(path).unlink(missing_ok=True)
        temporary.replace(path)
        write_atomically(path.with_suffix(".idx"), dali_index(samples).encode())
        write_index(path, index)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {error}; what is written stays, the same command goes on from there") from None
    finally:
        temporary.unlink(missing_ok=True)
        for archive in archives.values():
            archive.close()
    return len(job.samples)


def _record(
    sample: Sample, classes: list[ClassName], payload: bytes, wanted: Encoding | None
) -> dict[str, str | bytes]:
    kind = image_type(payload)
    if kind is None:
        raise DataError(f"{sample.place} is not a JPEG, PNG or WebP image; remove it from the source")
    described = classes[sample.label]
    facts: dict[str, object] = {
        "label": sample.label, "class": described.id, "name": described.name, "source": sample.name,
    }  # fmt: skip
    if wanted:
        try:
            encoded, original = encode(payload, wanted)
        except DecodeError as error:
            raise DataError(f"{sample.place} cannot be decoded: {error}; remove it from the source") from None
        facts |= {"shorter_side": wanted.shorter_side, "original": original}
        if encoded is not payload:  # an image that was small enough has a quality of its own
            kind, payload = "jpg", encoded
            facts["quality"] = wanted.quality
    return {
        "__key__": key_of(sample),
        kind: payload,
        "cls": str(sample.label).encode(),
        "json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode(),
    }


def key_of(sample: Sample) -> str:
    """The path in the source without its suffix. Dots go: WebDataset takes all after the first one as the suffix."""
    return str(PurePosixPath(sample.name).with_suffix("")).replace(".", "_")


def _check_keys(samples: list[Sample]) -> None:
    seen: dict[str, str] = {}
    for sample in samples:
        key = key_of(sample)
        if key in seen:
            raise DataError(f"{seen[key]} and {sample.name} would both get the key {key}; rename one of them")
        seen[key] = sample.name


def _manifest(root: Path, jobs: list[Job], classes: list[ClassName], plan: str) -> Manifest:
    indexes: dict[str, list[Index]] = {}
    for job in jobs:
        indexes.setdefault(job.split, []).append(read_index(Path(job.path)))
    splits = {split: [ShardEntry(i.shard, len(i), i.bytes, i.sha256) for i in of] for split, of in indexes.items()}
    samples = {split: write_table(root, split, of) for split, of in indexes.items()}
    return write_manifest(root, classes, splits, samples, plan)


def _digits_file(root: Path) -> Path:
    return root / f".digits.{os.getpid()}.zip"


def _digits_source(root: Path) -> Source:
    """The digits as a zip of class folders, which is then packed like any other."""
    with zipfile.ZipFile(_digits_file(root), "w") as archive:
        for split, name, label, png in digits():
            archive.writestr(f"{split}/{label}/{name}.png", png)
    return open_source(str(_digits_file(root)))
