"""Is the data set there: its manifest, and every shard in its size. Light to import: each rank of a job looks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.dataset import Dataset, Location, open_dataset
from pipeline.data.shards import DataError, Manifest
from pipeline.doctor.findings import Finding, fault, of_message, ok
from pipeline.launch.patience import within

SHOWN = 3  # names in a line
REMOTE_SECONDS = (
    15.0  # for manifest and tables: where credentials are looked for in vain a start takes most of a minute
)


class NotYet(Exception):
    """An indexing, which a first start would do now, and the doctor leaves to it."""


def opened(location: Location) -> Dataset:
    def opened() -> Dataset:
        return open_dataset(location, patient=False, say=_not_yet)

    return within(REMOTE_SECONDS, opened) if location.is_remote else opened()


def _not_yet(word: str) -> None:
    raise NotYet(word)


def check_digest(wanted: str, manifest: Manifest, difference: str, root: str) -> Iterator[Finding]:
    """The data set is that of the run."""
    if wanted and wanted != manifest.digest:
        yield fault("digest", f"data.root = {root} holds another data set than the run began with ({difference})",
                    "bring that one back, or start a new run")  # fmt: skip


def check_shards(dataset: Dataset, seconds: float = 3.0) -> Iterator[Finding]:
    """Every local shard is there, of its size; as many as time allows are opened and read at both ends."""
    entries = [entry for entries in dataset.manifest.splits.values() for entry in entries]
    if dataset.location.is_remote:
        yield ok("shards", dataset.streaming(0)[0])
        return
    root, until, read = Path(dataset.location.root), time.monotonic() + seconds, 0
    missing, sizes, unreadable = [], [], []
    for entry in entries:
        path = root / entry.shard
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                sizes.append(f"{entry.shard} has {size} bytes, {entry.bytes} were indexed")
            elif time.monotonic() < until:
                _read_ends(path)
                read += 1
        except FileNotFoundError:
            missing.append(entry.shard)
        except OSError as error:
            unreadable.append(f"{entry.shard}: {error.strerror}")
    if missing:
        yield fault("shards", f"{root} lacks {named(missing)}", "bring the shards back, or write them again")
    if sizes:
        yield fault("shards", f"cut short or changed: {named(sizes)}",
                    f"bring sound copies; `pipeline shards verify {root}` names every fault")  # fmt: skip
    if unreadable:
        yield fault("shards", f"cannot be read: {named(unreadable)}", "see owner and mode of the files, and the disk")
    if missing or sizes or unreadable:
        return
    try:
        dataset.check_shards()  # that none came after the indexing
    except DataError as error:
        yield of_message("shards", error)
        return
    total = sum(entry.bytes for entry in entries)
    held = f"{total / 1e9:.3g} GB" if total >= 1e9 else f"{total / 1e6:.3g} MB"
    some = "" if read == len(entries) else f", {read} of them opened in {seconds:g} s"
    yield ok("shards", f"{len(entries)} shards, {held}, all there and of their sizes{some}")


def _read_ends(path: Path) -> None:
    with path.open("rb") as file:
        file.read(512)
        file.seek(-512, os.SEEK_END)
        file.read(512)


def named(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return f"{'; '.join(names[:SHOWN]) if ' ' in names[0] else ', '.join(names[:SHOWN])}" + (
        f" and {more} more" if more > 0 else ""
    )
