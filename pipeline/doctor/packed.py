"""A data set: is everything there and whole, as far as that can be told in seconds. Packs and indexes nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import Dataset, Location, awaiting_index, open_dataset
from pipeline.data.decode import DecodeError
from pipeline.data.keyed_random import permutation
from pipeline.data.order import SORTED, WELL_MIXED, Order, shard_mixing, shuffle_quality
from pipeline.data.read_ahead import check_room
from pipeline.data.remote import Remote
from pipeline.data.shards import DataError, Manifest, ShardEntry, payload_digest, read_index
from pipeline.data.sources import DIGITS
from pipeline.data.split import Split
from pipeline.doctor.findings import Finding, fault, of_message, ok, warning
from pipeline.doctor.machine import existing
from pipeline.doctor.presence import NotYet, named, opened

_CONTACTS = 3  # tries of a server, within two seconds


def open_here(location: Location, source: str, scratch: Path) -> tuple[Dataset | None, list[Finding]]:
    """The data set, if it can be had without work that takes long; digits are packed into a scratch directory."""
    root = Path(location.root)
    if source and not location.is_remote and not root.exists():
        try:
            with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing(root)):
                pass
        except OSError as error:
            return None, [fault("root", f"data.root = {root} cannot be made: {error.strerror}",
                                "give a directory that can be written")]  # fmt: skip
        if source == DIGITS:
            from pipeline.data.writer import write_shards  # 1.5 s to import, needed here alone

            write_shards(source, scratch / DIGITS)
            return open_dataset(Location(str(scratch / DIGITS))), [
                ok("root", f"{root} is made at the first start: {source} are packed in seconds")
            ]
        if not Path(source).exists():
            return None, [fault("root", f"neither data.root = {root} nor data.source = {source} exists",
                                "give either of them")]  # fmt: skip
        return None, [warning("root", f"{root} is made at the first start from {source}: no image was looked at",
                              f"pack it now: pipeline shards write {source} {root}")]  # fmt: skip
    try:
        waiting = awaiting_index(location)
        dataset: Dataset | None = None
        # Of a remote set only the opening finds out; its first word about an indexing comes before the indexing.
        if not waiting:
            dataset = opened(location)
    except DataError as error:
        return None, [of_message("root", error)]
    except TimeoutError as error:
        return None, [fault("root", f"{location.root} cannot be opened: {error}",
                            "see the server, the network, and credentials (AWS_*, GOOGLE_*)")]  # fmt: skip
    except NotYet:
        dataset = None
    if dataset is None:
        which = f"{waiting} shards are" if waiting else "its shards are"
        return None, [warning("root", f"{which} not indexed yet, the first start does it: no image was looked at",
                              f"index them now: pipeline shards index {location.root}")]  # fmt: skip
    return dataset, []


def check_splits(manifest: Manifest, root: str) -> Iterator[Finding]:
    """Training and validation images are there."""
    for split in ("train", "val"):
        if not manifest.splits.get(split):
            yield fault("splits", f"data.root = {root} has no split {split!r}", "write it again from a source with "
                        f"{split}/ or with --holdout 0.1, or say which shards it is with data.{split}")  # fmt: skip


def check_tables(dataset: Dataset, num_classes: int) -> tuple[dict[str, Split], list[Finding]]:
    """The splits that can be opened: tables whole and those of the manifest, labels within the classes."""
    splits: dict[str, Split] = {}
    found = []
    for name in dataset.manifest.splits:
        try:
            split = dataset.split(name, num_classes)
        except DataError as error:
            found.append(of_message("tables", error))
            continue
        if len(split) != dataset.manifest.count(name):
            found.append(fault("tables", f"the table of {name} holds {len(split)} samples, the manifest counts "
                               f"{dataset.manifest.count(name)}", "write the shards again"))  # fmt: skip
            continue
        splits[name] = split
    if not found:
        classes = num_classes or len(dataset.manifest.classes)
        counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
        found.append(ok("tables", f"{counts} images in {classes} classes"))
    return splits, found


def check_indexes(dataset: Dataset, seconds: float = 1.0) -> Iterator[Finding]:
    """Indexes beside packed shards; training reads the tables made of them."""
    root = Path(dataset.location.root)
    if dataset.location.is_remote or dataset.directory != root:
        return
    until, bad, seen = time.monotonic() + seconds, [], 0
    entries = [entry for entries in dataset.manifest.splits.values() for entry in entries]
    for place in permutation(len(entries), key=0):
        entry = entries[int(place)]
        if time.monotonic() > until:
            break
        try:
            index = read_index(root / entry.shard)
        except DataError as error:
            bad.append(str(error).partition("; ")[0])
            continue
        seen += 1
        if (index.count, index.bytes, index.sha256) != (entry.count, entry.bytes, entry.sha256):
            bad.append(f"the index of {entry.shard} is that of another shard")
    if bad:
        yield warning("indexes", f"{named(sorted(bad))}: training goes by the tables, which are whole",
                      "write the shards again, or bring sound copies, before a table is lost, too")  # fmt: skip
    else:
        yield ok("indexes", f"{seen} of {len(entries)} read and whole")


def check_images(
    splits: Sequence[Split], read: Callable[[Split, int], None], seconds: float = 1.5, most: int = 100_000
) -> Iterator[Finding]:
    """A sample of the images of all shards against their hashes. read: raises DecodeError or DataError."""
    until, seen, bad = time.monotonic() + seconds, 0, []
    orders = [(split, _over_shards(split)) for split in splits]
    for turn in range(max((len(order) for _, order in orders), default=0)):
        for split, order in orders:
            if turn >= len(order) or time.monotonic() > until or seen >= most:
                continue
            sample = int(order[turn])
            seen += 1
            try:
                read(split, sample)
            except (DecodeError, DataError) as error:
                bad.append(f"{split.key(sample)} in {split.shard_of(sample)}: {error}")
    total = sum(len(order) for _, order in orders)
    if bad:
        yield fault("images", f"{len(bad)} of {seen:,} images read are damaged: {named(bad)}",
                    f"bring sound copies; `pipeline shards verify {splits[0].root}` names every fault")  # fmt: skip
    else:
        yield ok("images", f"{seen:,} of {total:,} read, and as they were indexed")


def _over_shards(split: Split) -> NDArray[np.int64]:
    """All samples in a fixed random order in which the shards take turns: a few of them are of as many shards."""
    order = permutation(len(split), key=0)
    shards = split.shard_S[order]
    turn = np.empty(len(order), dtype=np.int64)
    turn[np.argsort(shards, kind="stable")] = np.concatenate([np.arange(n) for n in np.bincount(shards)])
    return order[np.argsort(turn, kind="stable")]


def check_mixing(
    counts: Sequence[int], label_S: NDArray[np.integer], batch: int, window: int, seed: int
) -> Iterator[Finding]:
    """What shuffling within windows of shards costs."""
    order = Order(counts, seed=seed, window=window)
    if order.window >= len(counts):
        yield ok("order", f"all {len(counts)} shards are shuffled together")
        return
    quality = shuffle_quality(order, label_S, batch)
    text = (f"shuffle quality {quality:.2f} (label entropy of batches against a uniform draw), in windows of "
            f"{order.window} of {len(counts)} shards")  # fmt: skip
    if quality >= WELL_MIXED:
        yield ok("order", text)
    elif shard_mixing(counts, label_S) < SORTED:
        yield warning("order", f"{text}: the shards are sorted by class", "data.window=0, or write them again")
    else:
        yield warning("order", f"{text}: batches are less mixed than random ones", "raise data.window, or set it to 0")


def check_cache(
    limit: int,
    entries: Sequence[ShardEntry],
    window: int,
    said: Sequence[str],
    fits: str = "two windows of shards fit, and the disk has room for them",
) -> Iterator[Finding]:
    """Room for remote or staged shards. limit: bytes of the cache, 0 = none. said: what a start says of it."""
    try:
        check_room(limit, entries, window)
    except DataError as error:
        yield of_message("cache", error)
        return
    for line in said:
        yield of_message("cache", line, "warning")
    if not said:
        yield ok("cache", fits)


def remote_reader(root: str) -> Callable[[Split, int], None]:
    """Reads single images straight from a server that is given little time."""
    remote = Remote(root, contacts=_CONTACTS)

    def read(split: Split, sample: int) -> None:
        entry = split.entries[int(split.shard_S[sample])]
        payload = remote.read_range(entry.shard, int(split.offset_S[sample]), int(split.length_S[sample]))
        if payload_digest(payload) != split.digest(sample):
            raise DecodeError("its bytes are not those that were indexed")

    return read
