"""All samples of one split, numbered in the order of the shards: one table on disk, mapped by every process.

1,281,167 samples are 68 MB and more with longer keys, shared by the ranks and workers of a node and loaded
where they are touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import DataError, Index, Manifest, ShardEntry, file_sha256


def table_path(directory: Path, split: str) -> Path:
    return directory / f"{split}.samples.npy"


def write_table(directory: Path, split: str, indexes: Iterable[Index]) -> str:
    """Join the indexes of a split into its table; returns the table's hash."""
    indexes = list(indexes)
    longest = max((len(key.encode()) for index in indexes for key in index.key), default=1)
    kind = [
        ("shard", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("length", "<i4"), ("digest", "V16"),
        ("key", f"S{longest}"),
    ]  # fmt: skip
    path = table_path(directory, split)
    temporary = path.with_name(f".{path.name}.tmp")
    table = np.lib.format.open_memmap(
        temporary, mode="w+", dtype=np.dtype(kind), shape=(sum(map(len, indexes)),), version=(1, 0)
    )
    first = 0
    for number, index in enumerate(indexes):
        rows = table[first : first + len(index)]
        rows["shard"], rows["label"], rows["offset"], rows["length"] = number, index.label, index.offset, index.length
        rows["digest"] = np.frombuffer(bytes.fromhex("".join(index.digest)), "V16")
        rows["key"] = [key.encode() for key in index.key]
        first += len(index)
    table.flush()
    del table
    temporary.replace(path)
    return file_sha256(path)


class Split:
    """One split. root: directory or URL of its shards. Columns have length S; samples count over all shards."""

    def __init__(self, name: str, root: str, entries: Sequence[ShardEntry], table: Path):
        self.name, self.root, self.entries, self._table = name, root, list(entries), table
        self._version = _version(table)
        self._map()

    def _map(self) -> None:
        if _version(self._table) != self._version:
            raise DataError(f"{self._table} was made anew while it is in use; start the run again to go on with it")
        samples = np.load(self._table, mmap_mode="r", allow_pickle=False)
        self.shard_S: NDArray[np.int32] = samples["shard"]
        self.label_S: NDArray[np.int32] = samples["label"]
        self.offset_S: NDArray[np.int64] = samples["offset"]
        self.length_S: NDArray[np.int32] = samples["length"]
        self._digest_S, self._key_S = samples["digest"], samples["key"]

    @property
    def shard_counts(self) -> list[int]:
        return [entry.count for entry in self.entries]

    def __len__(self) -> int:
        return len(self.shard_S)

    def key(self, sample: int) -> str:
        return bytes(self._key_S[sample]).decode()

    def digest(self, sample: int) -> str:
        """Hash of the image's bytes, as shards.payload_digest gives it."""
        return bytes(self._digest_S[sample]).hex()

    def shard_of(self, sample: int) -> str:
        """Where the sample lies, for messages."""
        return f"{self.root}/{self.entries[int(self.shard_S[sample])].shard}"

    def __getstate__(self) -> dict[str, object]:
        return {"name": self.name, "root": self.root, "entries": self.entries, "_table": self._table,
                "_version": self._version}  # fmt: skip

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._map()  # a worker maps the same pages instead of copying them


def _version(path: Path) -> tuple[int, int, int]:
    """What tells a file from another one that took its place."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_split(root: str, directory: Path, manifest: Manifest, name: str, num_classes: int) -> Split:
    """A split whose table lies in directory. Raises DataError for a damaged table or a label outside the classes."""
    if name not in manifest.splits:
        raise DataError(f"{root} has no split {name!r}; it holds {sorted(manifest.splits)}")
    path = table_path(directory, name)
    try:
        sound = file_sha256(path) == manifest.samples.get(name)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run `pipeline shards index {root}`") from None
    if not sound:
        raise DataError(f"{path}: damaged, or of another data set than dataset.json; run `pipeline shards "
                        f"index {root}`")  # fmt: skip
    split = Split(name, root, manifest.splits[name], path)
    outside_S = np.flatnonzero((split.label_S < 0) | (split.label_S >= num_classes))
    if len(outside_S):
        sample = int(outside_S[0])
        raise DataError(
            f"{split.shard_of(sample)}: label {split.label_S[sample]} of sample {split.key(sample)} lies outside the "
            f"{num_classes} classes; labels run from 0 to {num_classes - 1}: check data.num_classes"
        )
    return split
