"""Shards: WebDataset tars, the index of each, and the manifest of the data set they make up.

    DIR/train-000000.tar     members KEY.jpg|png|webp, KEY.cls (label in ASCII), KEY.json, one sample after another
    DIR/train-000000.json    index: count, size, and for each sample key, label, offset, length, payload hash
    DIR/train-000000.idx     the offsets again, for readers that know DALI's format
    DIR/train.samples.npy    all indexes of a split in one table, which every process of a node maps (split.py)
    DIR/dataset.json         manifest: classes (id and name), and for each split its shards with counts and hashes

Every file carries a checksum of itself, so that a flipped byte is found and named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

MANIFEST = "dataset.json"
_SPLIT = re.compile(r"[\w-]+")
INDEX_FORMAT, MANIFEST_FORMAT = "pipeline-shard-index/2", "pipeline-dataset/2"


class DataError(Exception):
    """Data that cannot be used: the message names file, value, rule and way out."""


@dataclass(frozen=True, slots=True)
class ClassName:
    """One class: its identity in the source (a WNID, a folder's name) and its words."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard as the manifest lists it. shard: its path below the root; sha256: of the whole tar."""

    shard: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Index:
    """Where each sample of one shard lies. Lists run in the order of the tar."""

    shard: str
    count: int  # samples
    bytes: int
    sha256: str  # of the whole tar
    plan: str  # hash of what was to be written, by which an interrupted write goes on
    key: list[str]
    label: list[int]
    offset: list[int]  # of the image's first byte
    length: list[int]
    digest: list[str]  # of the image's bytes
    classes: dict[str, str]  # label -> identity of the class, where the shard tells it

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A data set. digest: of everything in it, part of a run's identity. samples: hash of each split's table."""

    classes: list[ClassName]
    splits: dict[str, list[ShardEntry]]
    samples: dict[str, str]
    plan: str
    digest: str

    def count(self, split: str) -> int:
        return sum(entry.count for entry in self.splits[split])


def payload_digest(payload: bytes) -> str:
    """Hash of one image's bytes, 128 bits in hex. Checked at every read: xxh3 takes 4 us for 109 KB, blake2b 115."""
    return xxhash.xxh3_128_hexdigest(payload)


def file_sha256(path: Path) -> str:
    """Hash of a whole file, read in pieces."""
    with path.open("rb") as file:
        return whole_sha256(file)


def whole_sha256(file: BinaryIO) -> str:
    """The same of an open file, from its first byte."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed's BinaryIO: no readinto


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def write_index(shard: Path, index: Index) -> None:
    _write_checked(index_path(shard), {"format": INDEX_FORMAT, **asdict(index)})


def read_index(shard: Path) -> Index:
    """The index beside a shard. Raises DataError if absent, damaged or inconsistent."""
    path = index_path(shard)
    content = _read_checked(path, INDEX_FORMAT)
    try:
        index = Index(**content)
        lengths = {len(column) for column in (index.key, index.label, index.offset, index.length, index.digest)}
    except TypeError as error:
        raise DataError(f"{path}: not a shard index ({error}); write the shards again") from None
    if lengths != {index.count}:
        raise DataError(f"{path}: count = {index.count}, its columns hold {sorted(lengths)}; write the shards again")
    return index


def write_manifest(
    root: Path,
    classes: list[ClassName],
    splits: dict[str, list[ShardEntry]],
    samples: dict[str, str],
    plan: str,
) -> Manifest:
    content = {
        "classes": [asdict(c) for c in classes],
        "splits": {name: [asdict(entry) for entry in entries] for name, entries in splits.items()},
    }
    digest = _checksum(content)
    facts = {**content, "samples": samples, "plan": plan, "digest": digest}
    _write_checked(root / MANIFEST, {"format": MANIFEST_FORMAT, **facts})
    return Manifest(classes, splits, samples, plan, digest)


def read_manifest(root: Path) -> Manifest:
    """The manifest of the data set at root. Raises DataError if root is no directory of shards."""
    if root.is_file():
        raise DataError(f"data.root = {root} is a file; give the directory that `pipeline shards write` made")
    if not (root / MANIFEST).is_file():
        what = "does not exist" if not root.exists() else f"holds no {MANIFEST}"
        raise DataError(f"data.root = {root} {what}; make it with `pipeline shards write SOURCE {root}`")
    try:
        content = (root / MANIFEST).read_bytes()
    except OSError as error:
        raise DataError(f"{root / MANIFEST}: {error.strerror}; write the shards again") from None
    return parse_manifest(content, str(root / MANIFEST))


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """A manifest from its bytes. where: what messages call it. Raises DataError."""
    content = _checked(raw, where, MANIFEST_FORMAT)
    try:
        manifest = Manifest(
            classes=[ClassName(**c) for c in content["classes"]],
            splits={name: [ShardEntry(**e) for e in entries] for name, entries in content["splits"].items()},
            samples=content["samples"],
            plan=content["plan"],
            digest=content["digest"],
        )
        named = [*manifest.splits, *manifest.samples]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not a manifest ({error}); write the shards again") from None
    if not all(_SPLIT.fullmatch(name) for name in named):  # a file is called after it, and it may come from anywhere
        raise DataError(f"{where}: splits {sorted(set(named))}, of which one is no plain word; write the shards again")
    return manifest


def difference(before: Manifest, now: Manifest) -> str:
    """In what two manifests differ, by the names of shards."""
    old, new = ({(s, e.shard): e for s, entries in m.splits.items() for e in entries} for m in (before, now))
    found = []
    for word, names in (
        ("changed", [name for (split, name), entry in new.items() if old.get((split, name), entry) != entry]),
        ("missing", [name for split, name in old.keys() - new.keys()]),
        ("new", [name for split, name in new.keys() - old.keys()]),
    ):
        if names:
            found.append(f"{min(names)}{f' and {len(names) - 1} more' if names[1:] else ''} {word}")
    return ", ".join(found) or "its classes differ"


def write_atomically(path: Path, content: bytes) -> None:
    """All of the content under its name, or nothing: a temporary file, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write_checked(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps({**content, "checksum": _checksum(content)}, separators=(",", ":")) + "\n"
    write_atomically(path, text.encode())


def _read_checked(path: Path, expected_format: str) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; write the shards again") from None
    return _checked(raw, str(path), expected_format)


def _checked(raw: bytes, where: str, expected_format: str) -> dict[str, Any]:
    known = True
    try:
        content: dict[str, Any] = json.loads(raw)
        checksum = content.pop("checksum")
        sound = checksum == _checksum(content)
        known = content.pop("format") == expected_format
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{where}: damaged, its content does not fit its checksum; write the shards again") from None
    if not known:
        raise DataError(f"{where}: not of format {expected_format}; write the shards again with this version") from None
    return content
