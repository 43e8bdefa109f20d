"""Whole epochs through the loaders, one after another: images a second and memory, which must not drift.

Training images in their order, then validation images, as a run reads them; nothing is trained.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.datamodule import ImageData
from pipeline.data.dataset import Dataset
from pipeline.data.loader import Batching


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass. Memory in MB at its end: resident of this process; private of its workers, the largest."""

    workers: int
    epoch: int
    images: int
    seconds: float
    resident: float
    worker_private: float


def epochs(dataset: Dataset, *, workers: int, count: int, size: int, batch: int) -> Iterator[Epoch]:
    """Pass over a data set `count` times with so many worker processes. Raises DataError."""
    data = ImageData(
        dataset,
        num_classes=len(dataset.manifest.classes),
        augment=Augmentation(size),
        crop=CentreCrop(size),
        batching=Batching(global_batch_size=batch, workers=workers),
    )
    for epoch in range(count):
        started, images = time.perf_counter(), 0
        for loader in (data.train_dataloader(), data.val_dataloader()):
            images += sum(int(each.weight_N.sum()) for each in loader)
        seconds = time.perf_counter() - started
        private = [memory(process.pid, "Private_Dirty") for process in multiprocessing.active_children() if process.pid]
        yield Epoch(workers, epoch, images, seconds, memory("self", "Rss"), max(private, default=0.0))


def memory(process: int | str, kind: str) -> float:
    """Memory of a process in MB, as Linux adds it up: Rss (resident), Private_Dirty (shared with no other)."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def report(passes: list[Epoch]) -> Table:
    table = Table("workers", "epoch", "images", "images/s", "MB resident", "MB private, a worker")
    for p in passes:
        table.add_row(str(p.workers), str(p.epoch + 1), f"{p.images:,}", f"{p.images / p.seconds:,.0f}",
                      f"{p.resident:,.0f}", f"{p.worker_private:,.0f}")  # fmt: skip
    return table
