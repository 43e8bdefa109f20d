"""Shards: WebDataset tars, the index beside each, and the manifest of the data set they make up.

    DIR/train-000000.tar     members KEY.jpg|png|webp, KEY.cls (label in ASCII), KEY.json, one sample after another
    DIR/train-000000.json    index: count, size, and for each sample key, label, offset, length, payload hash
    DIR/dataset.json         manifest: classes (id and name), and for each split its shards with counts and checksums

Every file carries a checksum of itself, so that a flipped byte is found and named.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST = "dataset.json"
INDEX_FORMAT, MANIFEST_FORMAT = "pipeline-shard-index/1", "pipeline-dataset/1"


class DataError(Exception):
    """Data that cannot be used: the message names file, value, rule and way out."""


@dataclass(frozen=True, slots=True)
class ClassName:
    """One class: its identity in the source (a WNID, a folder's name) and its words."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard as the manifest lists it. checksum: that of its index, which holds the shard's own hash."""

    shard: str
    count: int
    bytes: int
    checksum: str


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

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A packed data set. digest: of everything in it, part of a run's identity."""

    classes: list[ClassName]
    splits: dict[str, list[ShardEntry]]
    plan: str
    digest: str

    def count(self, split: str) -> int:
        return sum(entry.count for entry in self.splits[split])


def payload_digest(payload: bytes) -> str:
    """Hash of one image's bytes, 128 bits."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a whole file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def write_index(shard: Path, index: Index) -> None:
    _write_checked(index_path(shard), {"format": INDEX_FORMAT, **asdict(index)})


def read_index(shard: Path) -> tuple[Index, str]:
    """The index beside a shard, and its checksum. Raises DataError if absent, damaged or inconsistent."""
    path = index_path(shard)
    content, checksum = _read_checked(path, INDEX_FORMAT)
    try:
        index = Index(**content)
        lengths = {len(column) for column in (index.key, index.label, index.offset, index.length, index.digest)}
    except TypeError as error:
        raise DataError(f"{path}: not a shard index ({error}); write the shards again") from None
    if lengths != {index.count}:
        raise DataError(f"{path}: count = {index.count}, its columns hold {sorted(lengths)}; write the shards again")
    return index, checksum


def write_manifest(root: Path, classes: list[ClassName], splits: dict[str, list[ShardEntry]], plan: str) -> Manifest:
    content = {
        "classes": [asdict(c) for c in classes],
        "splits": {name: [asdict(entry) for entry in entries] for name, entries in splits.items()},
    }
    digest = _checksum(content)
    _write_checked(root / MANIFEST, {"format": MANIFEST_FORMAT, **content, "plan": plan, "digest": digest})
    return Manifest(classes, splits, plan, digest)


def read_manifest(root: Path) -> Manifest:
    """The manifest of the data set at root. Raises DataError if root is no directory of shards."""
    if root.is_file():
        raise DataError(f"data.root = {root} is a file; give the directory that `pipeline shards write` made")
    if not (root / MANIFEST).is_file():
        what = "does not exist" if not root.exists() else f"holds no {MANIFEST}"
        raise DataError(f"data.root = {root} {what}; make it with `pipeline shards write SOURCE {root}`")
    content, _ = _read_checked(root / MANIFEST, MANIFEST_FORMAT)
    try:
        return Manifest(
            classes=[ClassName(**c) for c in content["classes"]],
            splits={name: [ShardEntry(**e) for e in entries] for name, entries in content["splits"].items()},
            plan=content["plan"],
            digest=content["digest"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / MANIFEST}: not a manifest ({error}); write the shards again") from None


@dataclass(frozen=True, slots=True)
class Split:
    """All samples of one split, numbered in the order of the shards: parallel arrays of length S."""

    name: str
    shards: list[Path]
    shard_counts: list[int]
    key: list[str]
    shard_S: NDArray[np.int64]  # number of the shard that holds the sample
    offset_S: NDArray[np.int64]
    length_S: NDArray[np.int64]
    label_S: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.key)


def load_split(root: Path, manifest: Manifest, name: str, num_classes: int) -> Split:
    """One split's samples. Raises DataError for a missing or changed shard, or a label outside range(num_classes)."""
    if name not in manifest.splits:
        raise DataError(f"{root} has no split {name!r}; it holds {sorted(manifest.splits)}")
    indexes = []
    for entry in manifest.splits[name]:
        shard = root / entry.shard
        try:
            size = shard.stat().st_size
        except OSError as error:
            raise DataError(f"{shard}: {error.strerror}; bring the shard back, or write the shards again") from None
        index, checksum = read_index(shard)
        if checksum != entry.checksum or size != entry.bytes:
            raise DataError(f"{shard}: shard or index differs from {MANIFEST}; run `pipeline shards verify {root}`")
        indexes.append(index)
        outside = [label for label in index.label if not 0 <= label < num_classes]
        if outside:
            key = index.key[index.label.index(outside[0])]
            raise DataError(
                f"{shard}: label {outside[0]} of sample {key} lies outside the {num_classes} classes; "
                f"labels run from 0 to {num_classes - 1}: check data.num_classes"
            )

    def column(values: list[list[int]]) -> NDArray[np.int64]:
        return np.array([v for column in values for v in column], dtype=np.int64)

    counts = [len(index) for index in indexes]
    return Split(
        name=name,
        shards=[root / entry.shard for entry in manifest.splits[name]],
        shard_counts=counts,
        key=[key for index in indexes for key in index.key],
        shard_S=np.repeat(np.arange(len(counts)), counts),
        offset_S=column([index.offset for index in indexes]),
        length_S=column([index.length for index in indexes]),
        label_S=column([index.label for index in indexes]),
    )


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


def _read_checked(path: Path, expected_format: str) -> tuple[dict[str, Any], str]:
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        sound = checksum == _checksum(content) and content.pop("format") == expected_format
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; write the shards again") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{path}: damaged, its content does not fit its checksum; write the shards again") from None
    return content, checksum
