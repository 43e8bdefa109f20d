"""How long a run waits for its first batch, at the beginning of an epoch and late in it: it must not matter.

Each start is a process of its own. What is timed is opening the data set and the first batch; imports are not.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.table import Column, Table

from pipeline.benchmarks.epochs import memory
from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.datamodule import ImageData
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.loader import Batching


@dataclass(frozen=True, slots=True)
class Start:
    """One start. seconds: to the first batch; memory of a worker in MB (of this process with none)."""

    workers: int
    sample: int
    opened: float
    seconds: float
    resident: float
    private: float


def starts(
    root: str,
    *,
    samples: list[int],
    workers: list[int],
    repeats: int,
    size: int,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Start]:
    """Start at each place with each number of workers, `repeats` times, taking turns."""
    plan = [(sample, count) for _ in range(repeats) for count in workers for sample in samples]
    found = []
    for done, (sample, count) in enumerate(plan):
        progress(done, len(plan))
        arguments = json.dumps({"root": root, "sample": sample, "workers": count, "size": size, "batch": batch})
        # Not -m: a worker imports the main module of the process that it serves, and this one imports Lightning.
        code = f"from pipeline.benchmarks.start import run; run({arguments!r})"
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        found.append(Start(**json.loads(output.splitlines()[-1])))
    return found


def run(arguments: str) -> None:
    """One start, in the process that was made for it; prints a Start."""
    how = json.loads(arguments)
    began = time.perf_counter()
    dataset = open_dataset(Location(how["root"]))
    data = ImageData(
        dataset,
        num_classes=len(dataset.manifest.classes),
        augment=Augmentation(how["size"]),
        crop=CentreCrop(how["size"]),
        batching=Batching(global_batch_size=how["batch"], workers=how["workers"]),
    )
    opened = time.perf_counter() - began
    sample = how["sample"] // how["batch"] * how["batch"]
    data.load_state_dict({**data.state_dict(), "sample": sample})
    next(iter(data.train_dataloader()))
    seconds = time.perf_counter() - began
    processes: list[int | str] = [p.pid for p in multiprocessing.active_children() if p.pid] or ["self"]
    resident, private = (max(memory(p, kind) for p in processes) for kind in ("Rss", "Private_Dirty"))
    print(json.dumps(asdict(Start(how["workers"], sample, opened, seconds, resident, private))))


def report(found: list[Start]) -> Table:
    table = Table("workers", "sample", "opened", Column("first batch, s", no_wrap=True), "n", "MB", "private")
    for workers, sample in dict.fromkeys((s.workers, s.sample) for s in found):
        rows = [s for s in found if (s.workers, s.sample) == (workers, sample)]
        seconds = sorted(s.seconds for s in rows)
        table.add_row(
            str(workers), f"{sample:,}", f"{statistics.median(s.opened for s in rows):.2f}",
            f"{statistics.median(seconds):.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})", str(len(rows)),
            f"{max(s.resident for s in rows):,.0f}", f"{max(s.private for s in rows):,.0f}",
        )  # fmt: skip
    return table
