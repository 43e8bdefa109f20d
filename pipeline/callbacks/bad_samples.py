"""Bad samples: each is written down with what stood in for it, and too many stop the run.

Which is too many is counted over all ranks and one epoch, in which a sample is met once at most.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from rich.console import Console

from pipeline.callbacks.ledger import cut_lines
from pipeline.data.datamodule import ImageData
from pipeline.data.images import Fault
from pipeline.data.shards import DataError


class BadSamples(lightning.Callback):
    """A line each in bad-samples/rank-<r>.jsonl.

    budget: the fraction of a split's images that may be bad. count: this epoch's, of this rank.
    """

    def __init__(self, directory: Path, data: ImageData, *, budget: float, rank: int, console: Console):
        self.directory, self.data, self.budget, self.rank, self.console = directory, data, budget, rank, console
        self.count = 0
        self._epoch, self._step = 0, 0
        self._waiting: list[Fault] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._epoch, self._step = trainer.current_epoch, trainer.global_step
        if self.directory.is_dir():
            self.count = cut_lines(
                self.directory,
                self._step,
                rank=self.rank,
                world=trainer.world_size,
                count=lambda line: line["split"] == "train" and line["epoch"] == self._epoch,
            )

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch != self._epoch:
            self._epoch, self.count = trainer.current_epoch, 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._waiting += self._taken(self.data.train_loader.faults)
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.count += len(self._waiting)
            self._write("train", trainer, self._waiting)
            self._waiting = []

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        faults = self._taken(self.data.val_loader.faults)
        self._write("val", trainer, faults)
        total, images = round(sum_over_ranks([len(faults)], pl_module.device)[0]), len(self.data.val_images)
        if total:
            self.console.print(f"validation left out {total} of {images:,} images, listed in {self.directory}",
                               highlight=False, soft_wrap=True)  # fmt: skip
        if total > self.allowed(images):
            raise self._verdict(total, images, "validation")

    def allowed(self, images: int) -> int:
        """How many bad ones of so many images are within the budget."""
        return math.floor(self.budget * images)

    def check(self, total: int) -> None:
        """Raises DataError if the bad training samples of the epoch, over all ranks, exceed the budget."""
        images = len(self.data.train_loader.images.split)
        if total > self.allowed(images):
            raise self._verdict(total, images, f"training (epoch {self._epoch + 1})")

    def _verdict(self, total: int, images: int, what: str) -> DataError:
        return DataError(
            f"{total} of {images:,} {what} images cannot be used, data.bad_samples = {self.budget:g} allows "
            f"{self.allowed(images)}; {self.directory} lists them: run `pipeline shards verify {self.data.root}`, "
            "bring sound shards and go on, or raise data.bad_samples"
        )

    def _taken(self, faults: list[Fault]) -> list[Fault]:
        taken = list(faults)
        faults.clear()
        return taken

    def _write(self, split: str, trainer: lightning.Trainer, faults: list[Fault]) -> None:
        if not faults:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / f"rank-{self.rank}.jsonl").open("a") as file:
            for fault in faults:
                where = {"split": split, "epoch": trainer.current_epoch, "step": trainer.global_step}
                file.write(json.dumps({**where, **fault._asdict()}) + "\n")
                said = f"bad sample: {fault.shard}: {fault.key} at byte {fault.offset}: {fault.reason}"
                self.console.print(said, highlight=False, soft_wrap=True)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sums of small numbers over all ranks, in one reduction. A collective, and a wait for the device."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [float(value) for value in values]
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    summed: list[float] = totals.tolist()
    return summed
