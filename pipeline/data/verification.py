"""Re-reading every byte of a packed data set and naming each fault.

Per shard: its size and hash, every tar header and the order of its members, every image against the
hash in the index, every label; per data set: that manifest and indexes fit together. Anything else
that differs from what was written (padding, say) is caught by the hash of the whole shard.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.decode import DecodeError, decode
from pipeline.data.shards import (
    DataError,
    Index,
    Manifest,
    ShardEntry,
    file_sha256,
    payload_digest,
    read_index,
    read_manifest,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What was read, and each fault in one line."""

    samples: int
    shards: int
    bytes: int
    faults: list[str]


def verify(
    root: Path, *, decode_images: bool = False, workers: int = 1, progress: Callable[[int, int], None] = lambda *_: None
) -> Report:
    """Read the data set at root again, decoding each image on demand. Raises DataError without a manifest."""
    manifest = read_manifest(root)
    entries = [(split, entry) for split, entries in sorted(manifest.splits.items()) for entry in entries]
    total = sum(entry.count for _, entry in entries)
    faults: list[str] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:  # hashing and decoding release the interpreter lock
        checks = pool.map(lambda item: _shard_faults(root, manifest, item[1], decode_images), entries)
        for (_, entry), found in zip(entries, checks, strict=True):
            faults += found
            done += entry.count
            progress(done, total)
    return Report(total, len(entries), sum(entry.bytes for _, entry in entries), faults)


def _shard_faults(root: Path, manifest: Manifest, entry: ShardEntry, decode_images: bool) -> list[str]:
    path = root / entry.shard
    try:
        index, checksum = read_index(path)
    except DataError as error:
        return [str(error)]
    if not path.is_file():
        return [f"{path}: missing"]
    faults = []
    if checksum != entry.checksum:
        faults.append(f"{path.with_suffix('.json')}: is not the index that the manifest lists")
    size = path.stat().st_size
    if size != index.bytes:
        faults.append(f"{path}: has {size} bytes, written were {index.bytes}")
    faults += _sample_faults(path, index, len(manifest.classes), decode_images)
    faults += _member_faults(path, index)
    if not faults and file_sha256(path) != index.sha256:
        faults.append(f"{path}: differs from what was written, outside all images and headers")
    return faults


def _sample_faults(path: Path, index: Index, num_classes: int, decode_images: bool) -> list[str]:
    faults = []
    with path.open("rb") as file:
        columns = zip(index.key, index.label, index.offset, index.length, index.digest, strict=True)
        for key, label, offset, length, digest in columns:
            file.seek(offset)
            payload = file.read(length)
            if payload_digest(payload) != digest:
                faults.append(
                    f"{path}: image {key} (bytes {offset} to {offset + length}) differs from what was written"
                )
            elif decode_images:
                try:
                    decode(payload)
                except DecodeError as error:
                    faults.append(f"{path}: image {key} does not decode: {error}")
            if not 0 <= label < num_classes:
                faults.append(f"{path}: label {label} of {key} lies outside the {num_classes} classes")
    return faults


def _member_faults(path: Path, index: Index) -> list[str]:
    """Walk the headers. A damaged one hides all that follow, which tarfile alone would pass over in silence."""
    expected = dict(zip(index.offset, zip(index.key, index.label, strict=True), strict=True))
    labels = dict(zip(index.key, index.label, strict=True))
    found, end = 0, 0
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                key, _, suffix = member.name.partition(".")
                if suffix == "cls":
                    content = tar.extractfile(member)
                    text = content.read() if content else b""
                    if key not in labels or text != str(labels[key]).encode():
                        return [f"{path}: member {member.name} at byte {member.offset} does not fit the index"]
                elif member.offset_data in expected:
                    found += 1
                    if expected[member.offset_data][0] != key:
                        return [f"{path}: header at byte {member.offset} names {key}, the index another key"]
    except tarfile.TarError as error:
        return [f"{path}: tar header at byte {end}: {error}"]
    if found != len(index):
        return [f"{path}: damaged tar header at byte {end}: {found} of {len(index)} images can be reached"]
    return []
