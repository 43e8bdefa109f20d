"""Indexes of shards, made from the shards themselves: ours when they are written, anybody's when first used.

A sample is a run of members with one key: an image (jpg, jpeg, png or webp), its label as text in `cls`
or as "label" in `json`. Offsets that DALI or Energon noted beside a shard must agree with it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, BinaryIO

from pipeline.data.discovery import INFO
from pipeline.data.pool import completed
from pipeline.data.shards import (
    ClassName,
    DataError,
    Index,
    Manifest,
    ShardEntry,
    index_path,
    payload_digest,
    read_index,
    whole_sha256,
    write_atomically,
    write_index,
    write_manifest,
)
from pipeline.data.split import write_table
from pipeline.data.tars import Member, dali_index, members, read_dali_index, read_energon_index

Progress = Callable[[int, int], None]  # done, in all
IMAGES = ("jpg", "jpeg", "png", "webp")
_WNID = re.compile(r"(?:^|/)(n\d{8})[_/.]")
_MOST_CLASSES = 1_000_000
_ILSVRC = {"train": 1_281_167, "val": 50_000}


def index_shard(file: BinaryIO, name: str, plan: str = "") -> tuple[Index, list[list[Member]]]:
    """The index of a tar on disk and the members of each sample. name: what messages call it. Raises DataError."""
    index = Index(name, 0, os.fstat(file.fileno()).st_size, "", plan, [], [], [], [], [], {})
    listed: list[list[Member]] = []
    seen: set[str] = set()
    for key, sample in groupby(members(file, name), key=lambda m: (m.key_and_suffix or (None, ""))[0]):
        if key is None:
            continue  # a file without a suffix belongs to no sample: a README, say
        if key in seen:
            raise DataError(f"{name}: members of {key} do not lie side by side; write the shard again, one "
                            "sample after another")  # fmt: skip
        seen.add(key)
        content = list(sample)
        image, label, identity = _image(content, key, name), *_label(file, content, key, name)
        file.seek(image.offset)
        index.key.append(key)
        index.label.append(label)
        index.offset.append(image.offset)
        index.length.append(image.size)
        index.digest.append(payload_digest(file.read(image.size)))
        listed.append(content)
        if identity and index.classes.setdefault(str(label), identity) != identity:
            raise DataError(f"{name}: label {label} of {key} stands for {identity} and for "
                            f"{index.classes[str(label)]}; one label is one class")  # fmt: skip
    if not index.key:
        raise DataError(f"{name} holds no image; remove it, or write it again")
    facts = {field: getattr(index, field) for field in index.__slots__}
    return Index(**{**facts, "count": len(index.key), "sha256": whole_sha256(file)}), listed


def _image(sample: list[Member], key: str, where: str) -> Member:
    def suffix(member: Member) -> str:
        parts = member.key_and_suffix
        return parts[1] if parts else ""

    found = [m for m in sample if suffix(m) in IMAGES] or [m for m in sample if suffix(m).split(".")[-1] in IMAGES]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} images ({', '.join(m.name for m in found)})" if found else f"no image of {', '.join(IMAGES)}"
    raise DataError(f"{where}: sample {key} has {what}; a sample is one image and its label")


def _label(file: IO[bytes], sample: list[Member], key: str, where: str) -> tuple[int, str]:
    """The label, and the class it stands for where the sample says so."""
    by_suffix = {parts[1]: member for member in sample if (parts := member.key_and_suffix)}

    def content(suffix: str) -> bytes:
        member = by_suffix[suffix]
        file.seek(member.offset)
        return file.read(member.size)

    facts: dict[str, Any] = {}
    if "json" in by_suffix:
        try:
            loaded = json.loads(content("json"))
            facts = loaded if isinstance(loaded, dict) else {}
        except (ValueError, RecursionError):
            raise DataError(f"{where}: {key}.json is no JSON; write the shard again") from None
    label = content("cls").decode("ascii", "replace").strip() if "cls" in by_suffix else facts.get("label")
    whole = isinstance(label, int) and not isinstance(label, bool)
    if not whole and not (isinstance(label, str) and re.fullmatch(r"-?\d{1,12}", label.strip(), re.ASCII)):
        what = "neither cls nor a label in json" if label is None else f"label {label!r}, which is no whole number"
        raise DataError(f"{where}: sample {key} has {what}; training a classifier needs one for each image")
    number = int(label)  # type: ignore[arg-type]
    if number > _MOST_CLASSES:
        raise DataError(
            f"{where}: label {number} of {key} is no class; labels count from 0 to {_MOST_CLASSES:,} at most"
        )
    named = facts.get("class")
    wnid = _WNID.search(str(facts.get("filename", "")))
    return number, named if isinstance(named, str) else wnid[1] if wnid else ""


@dataclass(frozen=True, slots=True)
class IndexJob:
    """One shard to be indexed, into directory. beside: the shard, where notes of others may lie by it."""

    split: str
    shard: str
    directory: Path
    open: Callable[[str], BinaryIO]
    beside: Path | None

    @property
    def mark(self) -> Path:
        """Where its index waits until all are there; the name of another shard gives another one."""
        return self.directory / "marks" / self.shard

    def __call__(self) -> int:
        with self.open(self.shard) as file:
            index, samples = index_shard(file, self.shard)
        if self.beside is not None:
            _check_notes(self.beside, samples)
        offsets = (self.directory / self.shard).with_suffix(".idx")
        for path in (offsets, self.mark):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(offsets, dali_index(samples).encode())
        write_index(self.mark, index)
        return len(index)


def index_dataset(
    jobs: list[IndexJob],
    directory: Path,
    *,
    stated: dict[str, int] | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Index shards that have none into directory, in parallel; goes on where it was stopped. Raises DataError.

    stated: how many samples a shard holds, where the publisher says so.
    """
    waiting = [job for job in jobs if not index_path(job.mark).is_file()]
    progress(len(jobs) - len(waiting), len(jobs))
    with closing(completed(IndexJob.__call__, waiting, workers if len(waiting) > 1 else 1)) as counts:
        for done, _ in enumerate(counts, len(jobs) - len(waiting) + 1):
            progress(done, len(jobs))
    indexes = {job.shard: read_index(job.mark) for job in jobs}
    for shard, count in (stated or {}).items():
        if shard in indexes and len(indexes[shard]) != count:
            raise DataError(f"{shard} holds {len(indexes[shard])} samples, {INFO} says {count}; fetch it again")
    splits: dict[str, list[ShardEntry]] = {}
    for job in jobs:
        index = indexes[job.shard]
        splits.setdefault(job.split, []).append(ShardEntry(job.shard, len(index), index.bytes, index.sha256))
    classes, remarks = _classes(indexes.values())
    for remark in [*remarks, *_counts(splits, len(classes))]:
        say(remark)
    samples = {split: write_table(directory, split, (indexes[e.shard] for e in entries))
               for split, entries in splits.items()}  # fmt: skip
    manifest = write_manifest(directory, classes, splits, samples, plan="")
    return manifest


def _classes(indexes: Iterable[Index]) -> tuple[list[ClassName], list[str]]:
    """Classes in the order of their labels, and what is odd about them."""
    identities: dict[int, str] = {}
    highest = 0
    for index in indexes:
        highest = max(highest, *index.label)
        if min(index.label) < 0:
            key = index.key[index.label.index(min(index.label))]
            raise DataError(f"{index.shard}: label {min(index.label)} of {key} is negative; labels count from 0")
        for label, identity in index.classes.items():
            if identities.setdefault(int(label), identity) != identity:
                raise DataError(f"{index.shard}: label {label} stands for {identity}, in another shard for "
                                f"{identities[int(label)]}; one label is one class")  # fmt: skip
    named = [identities.get(label, str(label)) for label in range(highest + 1)]
    remarks = []
    wnids = [identities[label] for label in sorted(identities)]
    if all(_WNID.match(f"{wnid}/") for wnid in wnids) and wnids != sorted(wnids):
        remarks.append(f"labels do not follow the sorted WNIDs (0 is {named[0]}): perhaps the devkit's own ids; "
                       "weights of other projects take the sorted order for granted")  # fmt: skip
    return [ClassName(identity, identity) for identity in named], remarks


def _counts(splits: dict[str, list[ShardEntry]], classes: int) -> Iterator[str]:
    for split, whole in _ILSVRC.items():
        count = sum(entry.count for entry in splits.get(split, []))
        if classes == 1000 and 0.95 * whole < count < 1.05 * whole and count != whole:
            yield f"{split} holds {count:,} images; that of ILSVRC2012 has {whole:,}"


def _check_notes(shard: Path, samples: list[list[Member]]) -> None:
    """What DALI's or Energon's index beside a shard says must be what the shard holds."""
    noted = shard.with_suffix(".idx")
    if noted.is_file():
        listed = read_dali_index(noted)
        own = {((m.key_and_suffix or ("", ""))[1], m.offset, m.size) for sample in samples for m in sample}
        if listed != own:
            raise DataError(f"{noted} lists {len(listed)} members, of which {len(listed & own)} are among the "
                            f"{len(own)} of {shard.name}; fetch the shard again, or remove the index")  # fmt: skip
    noted = shard.with_name(shard.name + ".idx")
    if noted.is_file():
        starts = read_energon_index(noted)
        with shard.open("rb") as file:
            headers = {m.header for m in members(file, str(shard))}
        known = {start for start in starts if start in headers}
        if len(starts) - len(known) > 1 or not 0 <= len(starts) - len(samples) <= 1:  # the last may be the tar's end
            raise DataError(f"{noted} lists {len(starts)} samples, {shard.name} holds {len(samples)}; fetch the shard "
                            "again, or remove the index")  # fmt: skip
