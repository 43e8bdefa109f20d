"""What a run must know of its data before it starts; cheap, so that a mistake shows where the user typed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.data.dataset import Dataset, Location, open_dataset
from pipeline.data.indexing import Progress
from pipeline.data.shards import DataError


def ready_data(
    location: Location,
    *,
    source: str = "",
    workers: int = 1,
    patient: bool = True,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> Dataset:
    """The data set at a location, with training and validation images; packed from source if absent.

    source: what to pack on first use ("" = nothing). patient: see open_dataset. Raises DataError.
    """
    root = Path(location.root)
    if source and not location.is_remote and not root.exists():
        say(f"packing {source} into {root}")
        _pack(source, root)
    dataset = open_dataset(location, workers=workers, patient=patient, progress=progress, say=say)
    for split in ("train", "val"):
        if not dataset.manifest.splits.get(split):
            raise DataError(
                f"data.root = {location.root} has no split {split!r}; write it again from a source with {split}/ or "
                f"with --holdout 0.1, or say which shards it is with data.{split}"
            )
    dataset.check_shards()
    return dataset


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
