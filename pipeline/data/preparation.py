"""What a run must know of its data before it starts; cheap, so that a mistake shows where the user typed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.data.shards import DataError, Manifest, read_manifest


def ready_data(root: Path, *, source: str = "", say: Callable[[str], None] = print) -> Manifest:
    """The manifest of the data set at root, with training and validation images; packed from source if absent.

    source: what to pack on first use ("" = nothing). Raises DataError.
    """
    if source and not root.exists():
        say(f"packing {source} into {root}")
        _pack(source, root)
    manifest = read_manifest(root)
    for split in ("train", "val"):
        if not manifest.splits.get(split):
            raise DataError(
                f"data.root = {root} has no split {split!r}; write it again from a source with {split}/, "
                "or with --holdout 0.1"
            )
        missing = [entry.shard for entry in manifest.splits[split] if not (root / entry.shard).is_file()]
        if missing:
            raise DataError(
                f"data.root = {root} lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}; "
                "bring the shards back, or write them again"
            )
    return manifest


def _pack(source: str, root: Path) -> None:
    """Pack beside root and rename: of several runs that start at once, one brings its directory in."""
    from pipeline.data.writer import write_shards  # 1.5 s to import, needed once a data set

    aside = root.with_name(f".{root.name}.{os.getpid()}")
    write_shards(source, aside)
    try:
        aside.rename(root)
    except OSError:
        if not root.exists():
            raise
        shutil.rmtree(aside)
