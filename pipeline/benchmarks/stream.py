"""The stream against the decoders and loaders that people use: images per CPU second, one thread each.

Two tables, decode and crop (crops.py) and the whole stream (readers.py), and what our region decoding changes in the
pixels.   pipeline bench stream ROOT
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipeline.benchmarks import crops, readers
from pipeline.benchmarks.rounds import Row, best_peer, machine, measured, ratios, versions
from pipeline.data.augment import Augmentation, resized
from pipeline.data.dataset import Dataset
from pipeline.data.decode import DecodeError, decode, decode_region
from pipeline.data.images import open_images
from pipeline.data.order import Order
from pipeline.data.shards import DataError

NAMES = list(dict.fromkeys(c.name for group in (crops.CONTENDERS, readers.CONTENDERS) for c in group))
_DISTRIBUTIONS = (
    "torch", "torchvision", "pillow", "simplejpeg", "opencv-python-headless", "webdataset", "timm",
    "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How our crops differ from decoding all, cutting and resizing, in levels of 0..255."""

    crops: int
    scaled: int  # of them decoded at 1/2, 1/4 or 1/8
    scaled_mean: float  # against our own resizing; 0 where none is scaled
    scaled_max: int
    pillow_max: int  # of the others, against Pillow's resizing


@dataclass(frozen=True, slots=True)
class Result:
    size: int
    images: int  # of a round of the first table
    skipped: int  # not read by every contender
    crops: list[Row]
    stream: list[Row]
    fidelity: Fidelity


def compare(
    dataset: Dataset,
    *,
    split: str,
    images: int,
    rounds: int,
    size: int,
    batch: int,
    only: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Measure both groups, or those of their contenders that are named. Raises DataError."""
    if dataset.cache is not None:
        raise DataError(f"{dataset.location.root} is remote, and the peers read files; give shards on a local disk")
    opened = open_images(dataset, split, 0)
    count = min(images, len(opened.split))
    if count < batch:
        raise DataError(f"--batch {batch} exceeds the {count} images of a round; lower it, or raise --images")
    order = Order(opened.split.shard_counts, seed=0)
    try:
        payloads = [opened.stream.read(order.sample(0, index)) for index in range(count)]
    except DecodeError as error:
        root = dataset.location.root
        raise DataError(f"{root}: an image {error}; run `pipeline shards verify {root}`") from None
    common = [payload for payload in payloads if crops.is_common(payload)]
    if not common:
        raise DataError(f"{split} of {dataset.location.root} holds no JPEG that all contenders read; give photographs")
    first = [c for c in crops.CONTENDERS if not only or c.name in only]
    second = [c for c in readers.CONTENDERS if not only or c.name in only]
    total = (len(first) + len(second)) * (rounds + 1)
    before = len(first) * (rounds + 1)
    crop_rows = measured(first, crops.CropTask(common, size, batch), rounds, lambda done, _: progress(done, total))
    task = readers.StreamTask(dataset, split, count // batch * batch, size, batch)
    stream_rows = measured(second, task, rounds, lambda done, _: progress(before + done, total))
    return Result(size, len(common), count - len(common), crop_rows, stream_rows, fidelity(common, size))


def fidelity(payloads: Sequence[bytes], size: int) -> Fidelity:
    """One crop of each image, ours beside the long way."""
    augment = Augmentation(size=size, area_min=crops.AREA[0])
    scaled, plain = [], []
    for image, payload in enumerate(payloads):
        whole = decode(payload)
        box = left, top, right, bottom = augment.box(whole.shape[1], whole.shape[0], crops.key_of(0, image))
        region = whole[top:bottom, left:right]
        decoded = decode_region(payload, lambda width, height, box=box: box, size)  # type: ignore[misc]
        ours = resized(decoded, size).astype(int)
        if decoded.shape != region.shape:
            scaled.append(np.abs(ours - resized(region, size)))
        else:
            other = Image.fromarray(region).resize((size, size), Image.Resampling.BILINEAR)
            plain.append(np.abs(ours - np.asarray(other)))
    return Fidelity(
        crops=len(payloads),
        scaled=len(scaled),
        scaled_mean=float(np.mean([d.mean() for d in scaled])) if scaled else 0.0,
        scaled_max=max((int(d.max()) for d in scaled), default=0),
        pillow_max=max((int(d.max()) for d in plain), default=0),
    )


def verdict(rows: Sequence[Row]) -> list[str]:
    """Ours over what it is measured by, each as median [lowest to highest] of the rounds' ratios."""
    named = {row.name: row for row in rows if row.rounds}
    best = best_peer(rows)
    others = [(f"best packaged peer ({best.name})", best)] if best else []
    others += [("floor", named[n]) for n in (crops.FLOOR.name,) if n in named]
    others += [("webdataset + Pillow", named[n]) for n in ("webdataset-pillow",) if n in named]
    if "ours" not in named:
        return []
    return [f"ours / {name} {_spread(ratios(named['ours'], other), 2)}" for name, other in others]


def report(result: Result, console: Console) -> None:
    """Both tables, their verdicts, the pixels, and what they were measured on."""
    skipped = f"{result.skipped} skipped for all: not every contender reads them"
    titles = (
        f"Decode and crop: {result.images} JPEGs in memory -> uint8 {result.size} x {result.size} x 3 ({skipped})",
        "The whole stream: tars on disk -> batches of uint8 with labels",
    )
    for title, rows in zip(titles, (result.crops, result.stream), strict=True):
        if rows:
            console.print(_table(title, rows))
            console.print("; ".join(verdict(rows)), soft_wrap=True)
    f = result.fidelity
    console.print(
        f"Pixels: {f.crops - f.scaled} of {f.crops} crops unscaled, at most {f.pillow_max} levels from decode, cut and "
        f"Pillow's resize; {f.scaled} ({f.scaled / f.crops:.1%}) decoded at 1/2 or less, {f.scaled_mean:.2f} levels "
        f"from decode, cut and resize in the mean, {f.scaled_max} at most.",
        soft_wrap=True,
    )
    console.print(f"Machine: {machine()}; {versions(_DISTRIBUTIONS)}", soft_wrap=True)


def write_csv(result: Result, path: Path) -> None:
    """Every round as it was measured; a contender without rounds has none."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("group", "contender", "round", "images", "cpu_seconds", "wall_seconds"))
        for group, rows in (("crops", result.crops), ("stream", result.stream)):
            for row in rows:
                writer.writerows((group, row.name, number, *r) for number, r in enumerate(row.rounds, 1))


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table("contender", "what it does", title=title, title_justify="left")
    for heading in ("images/CPU s", "n", "x best peer", "x floor", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    floor = next((row for row in rows if row.name == crops.FLOOR.name and row.rounds), None)
    best = best_peer(rows)
    for row in rows:
        if row.missing:
            table.add_row(row.name, f"{row.what}: {row.missing}", "-", "0", "-", "-", "-")
            continue
        against = [f"{statistics.median(ratios(row, other)):.2f}" if other else "-" for other in (best, floor)]
        table.add_row(
            row.name, row.what, _spread(row.rates, 0), str(len(row.rounds)), *against, f"{row.wall_rate:,.0f}"
        )
    return table


def _spread(values: Sequence[float], digits: int) -> str:
    # round brackets: square ones are markup of rich
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
