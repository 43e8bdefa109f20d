"""pipeline shards: pack images, index tars of others, check and look at them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.codes import BAD_DATA, DONE
from pipeline.cli.options import add_verb, count, gigabytes
from pipeline.cli.progress import Progress

if TYPE_CHECKING:
    from pipeline.data.dataset import Dataset
    from pipeline.data.description import SplitFacts


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(verbs, "write", write, "pack images into shards; goes on where it was stopped",
                 "pipeline shards write cifar10.zip shards/cifar10 --workers 2", goes_on=True)  # fmt: skip
    p.add_argument("source", help="class folders, a zip of them, ILSVRC2012 (tars, or Kaggle's tree), "
                                  "or Hugging Face's parquet files")  # fmt: skip
    p.add_argument("root", help="directory for the shards")
    p.add_argument("--samples-per-shard", type=count, default=1000, metavar="N")
    p.add_argument("--workers", type=count, default=1, metavar="N", help="processes; the same bytes")
    p.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    p.add_argument("--holdout", type=float, default=0.0, metavar="F",
                   help="without a val/ folder: the fraction of each class to validate on")  # fmt: skip
    p.add_argument(
        "--shorter-side", type=int, metavar="N",
        help="re-encode larger images to N pixels on the shorter side (default: keep every byte)",
    )  # fmt: skip
    p.add_argument("--quality", type=int, metavar="Q",
                   help="with --shorter-side: of the JPEG, 1 to 100 (default: 90)")  # fmt: skip

    p = add_verb(verbs, "verify", verify, "read every byte again and name each fault",
                 "pipeline shards verify shards/cifar10 --decode")  # fmt: skip
    _add_location(p)
    p.add_argument("--decode", action="store_true", help="decode every image, too")
    p.add_argument("--workers", type=count, default=2, metavar="N", help="shards read at a time")

    p = add_verb(verbs, "index", index, "index tars of other makers, to train on them; anew if that was done",
                 "pipeline shards index imagenet-1k-wds --workers 8")  # fmt: skip
    _add_location(p)
    p.add_argument("--workers", type=count, default=2, metavar="N", help="processes, a shard each")

    p = add_verb(verbs, "describe", describe, "counts, classes, sizes, and a contact sheet as PNG",
                 "pipeline shards describe shards/cifar10 --sheet cifar10.png")  # fmt: skip
    _add_location(p)
    p.add_argument("--split", help="of the contact sheet (default: the first)")
    p.add_argument("--sheet", metavar="FILE", help="where to draw it (default: NAME-SPLIT.png here)")


def write(options: argparse.Namespace) -> int:
    from pipeline.data.writer import write_shards

    with Progress("writing", "images") as progress:
        manifest = write_shards(
            options.source,
            Path(options.root),
            samples_per_shard=options.samples_per_shard,
            workers=options.workers,
            seed=options.seed,
            holdout=options.holdout,
            shorter_side=options.shorter_side,
            quality=options.quality,
            progress=progress,
        )
    for split in manifest.splits:
        print(f"{options.root}: {split}: {manifest.count(split):,} images in {len(manifest.splits[split])} shards")
    print(f"{len(manifest.classes)} classes; digest {manifest.digest[:16]}")
    return DONE


def verify(options: argparse.Namespace) -> int:
    from pipeline.data import verification

    dataset = _dataset(options)
    with Progress("verifying", "images") as progress:
        report = verification.verify(dataset, decode_images=options.decode, workers=options.workers, progress=progress)
    for fault in report.faults:
        print(fault, file=sys.stderr)
    verdict = f"{len(report.faults)} faults" if report.faults else "sound"
    print(
        f"{options.root}: {report.samples:,} images in {report.shards} shards, {report.bytes / 1e6:,.1f} MB: {verdict}"
    )
    return BAD_DATA if report.faults else DONE


def index(options: argparse.Namespace) -> int:
    with Progress("indexing", "shards") as progress:
        dataset = _dataset(options, again=True, progress=progress)
    for split, entries in dataset.manifest.splits.items():
        print(f"{options.root}: {split}: {dataset.manifest.count(split):,} images in {len(entries)} shards")
    print(f"{len(dataset.manifest.classes)} classes; digest {dataset.manifest.digest[:16]}")
    return DONE


def describe(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pipeline.data import description
    from pipeline.data.order import SORTED
    from pipeline.data.shards import DataError

    dataset = _dataset(options)
    split = options.split or next(iter(sorted(dataset.manifest.splits)))
    if split not in dataset.manifest.splits:
        raise DataError(f"--split {split} is not there; {options.root} holds {sorted(dataset.manifest.splits)}")
    manifest, facts = dataset.manifest, description.describe(dataset)
    table = Table("", *facts)
    rows: list[tuple[str, Callable[[SplitFacts], str]]] = [
        ("images", lambda f: f"{f.samples:,}"),
        ("shards", lambda f: f"{f.shards:,}"),
        ("MB of images", lambda f: f"{f.bytes_total / 1e6:,.1f}"),
        ("bytes an image", lambda f: f"{f.bytes_mean:,.0f}"),
        ("images a class", lambda f: f"{f.class_fewest:,} to {f.class_most:,}"),
        ("width", lambda f: _spread(f.width)),
        ("height", lambda f: _spread(f.height)),
        ("mixing of shards", lambda f: f"{f.mixing:.2f}"),
    ]
    for name, value in rows:
        table.add_row(name, *map(value, facts.values()))
    console = Console()
    console.print(table)
    names = [c.name for c in manifest.classes]
    print(f"{len(names)} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    print(f"digest {manifest.digest}")
    path = Path(options.sheet or f"{Path(options.root).name}-{split}.png")
    description.contact_sheet(dataset, split).save(path)
    print(f"contact sheet of {split}: {path}")
    if any(f.mixing < SORTED and f.shards > 1 for f in facts.values()):
        print(f"mixing below {SORTED}: shards are sorted by class; data.window=0 shuffles over all of them")
    return DONE


def _spread(values: tuple[int, int, int]) -> str:
    low, median, high = values
    return str(median) if low == high else f"{low} to {high}, median {median}"


def _dataset(options: argparse.Namespace, **how: Any) -> Dataset:
    """The data set that a verb of `shards` is about."""
    from pipeline.data.dataset import Location, open_dataset

    cache_bytes = int(options.cache_gb * 1e9)
    location = Location(options.root, options.train or "", options.val or "", options.cache or "", cache_bytes)
    return open_dataset(location, workers=getattr(options, "workers", 1), patient=False, **how)


def _add_location(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", help="directory or http(s), s3 or gs URL of the shards")
    parser.add_argument("--train", metavar="PATTERN", help="brace pattern or glob of the training shards below root")
    parser.add_argument("--val", metavar="PATTERN", help="the same of the validation shards")
    parser.add_argument("--cache", metavar="DIR", help="for remote shards (default: ~/.cache/pipeline)")
    parser.add_argument("--cache-gb", type=gigabytes, default=0.0, metavar="N",
                        help="limit on remote shards kept there (default: 0, none)")  # fmt: skip
