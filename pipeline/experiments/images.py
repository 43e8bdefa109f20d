"""The images that an experiment trains on: those at hand, or scikit-learn's digits, which come with the package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.shards import MANIFEST, DataError, Manifest, read_manifest
from pipeline.experiments.experiment import Setting
from pipeline.experiments.versions import fingerprint

_DIGITS = (
    "Trained on scikit-learn's digits, 1,437 images of 8x8 pixels to train on and 360 to validate, which need no "
    "download; --data {0}=PLACE for the data set of the claim's size."
)


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """words: the data of a training, as key=value. train, val: how many images. remarks: what to say of them.

    root: of all shards.
    """

    name: str
    words: Sequence[str]
    train: int
    remarks: Sequence[str]
    val: int
    classes: int
    root: Path


def images(
    setting: Setting, pages: Sequence[str], *, otherwise: str = "digits", train: int = 0, val: int = 0
) -> TrainingImages:
    """Those of the first page that the setting has a place for, as conf/data/<page>.yaml treats them; or `otherwise`'s.

    train, val: how many are enough: as many whole shards are taken as hold them; 0 = all. Packed on first use.
    Raises DataError for a place that holds none.
    """
    from pipeline.data.writer import write_shards  # 1.5 s to import

    name = next((page for page in pages if page in setting.data), otherwise)
    place = setting.data.get(name, "")
    if place and (Path(place) / MANIFEST).is_file():
        root = Path(place)
    else:
        root = setting.shards / (f"{name}-{fingerprint(place)}" if place else name)
        if not (root / MANIFEST).is_file():
            what = f"packing {place or name}"
            write_shards(place or otherwise, root, workers=os.cpu_count() or 1, say=lambda text: None,
                         progress=lambda done, total: setting.progress(done, total, what))  # fmt: skip
    manifest = read_manifest(root)
    for split in ("train", "val"):
        if not manifest.splits.get(split):
            raise DataError(f"--data {name}={place} has no split {split!r}; give images to train on and others "
                                  "to validate on, as train/ and test/")  # fmt: skip
    words = [f"data={name}", f"data.root={root.resolve()}", "data.source=''"]
    counts = {}
    for split, enough in (("train", train), ("val", val)):
        names, counts[split] = _shards(manifest, split, enough)
        if counts[split] < manifest.count(split):
            words.append(f'data.{split}="{{{",".join(names)}}}"' if len(names) > 1 else f'data.{split}="{names[0]}"')
    remarks = [] if place else [_DIGITS.format(pages[0])]
    for split, what in (("train", "to train on"), ("val", "to validate")):
        if counts[split] < manifest.count(split):
            remarks.append(f"A part of the images, so that a CPU takes minutes: {counts[split]:,} of "
                           f"{manifest.count(split):,} {what}.")  # fmt: skip
    return TrainingImages(name, words, counts["train"], remarks, counts["val"], len(manifest.classes),
                          root)  # fmt: skip


def _shards(manifest: Manifest, split: str, enough: int) -> tuple[list[str], int]:
    """The first ones that hold enough images, and how many; all for 0."""
    names, count = [], 0
    for entry in manifest.splits[split]:
        names.append(entry.shard)
        count += entry.count
        if enough and count >= enough:
            break
    return names, count
