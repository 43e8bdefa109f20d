"""Re-reading every byte of a data set and naming each fault.

Per shard: its size and hash, every tar header and the order of its members, every image against the
hash in the index, every label. Anything else that differs from what was indexed (padding, say) is
caught by the hash of the whole shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from pipeline.data.dataset import Dataset
from pipeline.data.decode import DecodeError, decode
from pipeline.data.shards import DataError, payload_digest, whole_sha256
from pipeline.data.split import Split
from pipeline.data.tars import Member, members


@dataclass(frozen=True, slots=True)
class Report:
    """What was read, and each fault in one line."""

    samples: int
    shards: int
    bytes: int
    faults: list[str]


def verify(
    dataset: Dataset,
    *,
    decode_images: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """Read a data set again, decoding each image on demand. Raises DataError for a damaged table."""
    splits = {name: dataset.split(name) for name in sorted(dataset.manifest.splits)}
    checks = [(split, number) for split in splits.values() for number in range(len(split.entries))]
    total = sum(len(split) for split in splits.values())
    faults: list[str] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:  # hashing and decoding release the interpreter lock
        found = pool.map(lambda check: _shard_faults(dataset, check[0], check[1], decode_images), checks)
        for (split, number), shard_faults in zip(checks, found, strict=True):
            faults += shard_faults
            done += split.entries[number].count
            progress(done, total)
    entries = [split.entries[number] for split, number in checks]
    return Report(total, len(entries), sum(entry.bytes for entry in entries), faults)


def _shard_faults(dataset: Dataset, split: Split, number: int, decode_images: bool) -> list[str]:
    entry = split.entries[number]
    if dataset.cache is None and not dataset.path(entry).is_file():
        return [f"{dataset.path(entry)}: missing"]
    try:
        file = dataset.open(entry)  # once: a cache may give the path to another shard meanwhile
    except DataError as error:
        return [str(error)]
    with file:
        size = os.fstat(file.fileno()).st_size
        faults = [] if size == entry.bytes else [f"{file.name}: has {size} bytes, indexed were {entry.bytes}"]
        first, last = np.searchsorted(split.shard_S, [number, number + 1])
        samples = range(int(first), int(last))
        faults += _image_faults(file, split, samples, decode_images)
        faults += _member_faults(file, split, samples)
        if not faults and whole_sha256(file) != entry.sha256:
            faults.append(f"{file.name}: differs from what was indexed, outside all images and headers")
    return faults


def _image_faults(file: BinaryIO, split: Split, samples: range, decode_images: bool) -> list[str]:
    faults, path = [], file.name
    for sample in samples:
        offset, length = int(split.offset_S[sample]), int(split.length_S[sample])
        file.seek(offset)
        payload = file.read(length)
        if payload_digest(payload) != split.digest(sample):
            faults.append(f"{path}: image {split.key(sample)} (bytes {offset} to {offset + length}) differs from "
                          "what was indexed")  # fmt: skip
        elif decode_images:
            try:
                decode(payload)
            except DecodeError as error:
                faults.append(f"{path}: image {split.key(sample)} does not decode: {error}")
    return faults


def _member_faults(file: BinaryIO, split: Split, samples: range) -> list[str]:
    """Walk the headers, of which a damaged one hides all that follow, and read the labels."""
    keys = {int(split.offset_S[s]): split.key(s) for s in samples}
    labels = {split.key(s): int(split.label_S[s]) for s in samples}
    found, path = 0, file.name
    file.seek(0)
    try:
        walked: list[Member] = list(members(file, path, remedy="bring a sound copy"))
    except DataError as error:
        return [str(error)]
    for member in walked:
        key, suffix = member.key_and_suffix or ("", "")
        if member.offset in keys:
            found += 1
            if keys[member.offset] != key:
                return [f"{path}: header at byte {member.header} names {key}, the index another key"]
        elif suffix == "cls":
            file.seek(member.offset)
            text = file.read(member.size).decode("ascii", "replace").strip()
            if key not in labels or text != str(labels[key]):
                return [f"{path}: member {member.name} at byte {member.header} does not fit the index"]
    if found != len(samples):
        return [f"{path}: {found} of {len(samples)} images can be reached by its headers"]
    return []
