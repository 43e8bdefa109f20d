"""Which samples every step trained on, rank by rank: the proof that a run saw what it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning

from pipeline.data.batch import Batch


class Ledger(lightning.Callback):
    """One line a step in ledger/rank-<r>.jsonl: {"epoch", "step", "keys"}; steps count from 1."""

    def __init__(self, directory: Path, *, rank: int, keys: Callable[[list[int]], list[str]]):
        self.path, self.rank, self.keys_of = directory / f"rank-{rank}.jsonl", rank, keys
        self._samples: list[int] = []
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        cut_lines(self.path.parent, self._step, rank=self.rank, world=trainer.world_size)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if not getattr(pl_module, "skips", False):  # what was skipped was not trained on
            self._samples += batch.sample_N.tolist()
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            line = {"epoch": trainer.current_epoch, "step": self._step, "keys": self.keys_of(self._samples)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._samples = []


def cut_lines(
    directory: Path, last_step: int, *, rank: int, world: int, count: Callable[[dict[str, Any]], bool] = bool
) -> int:
    """Take out what will be trained again, and a last line that a crash cut short; returns how many stay that count.

    Of this rank's file and, for rank 0, of files of ranks that this start does not have. Line by line: a ledger of
    ImageNet is gigabytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"rank-{rank}.jsonl"]
    if rank == 0:
        paths += [p for p in directory.glob("rank-*.jsonl") if int(p.stem.partition("-")[2]) >= world]
    kept = 0
    for path in paths:
        if not path.exists():
            continue
        temporary = path.with_name(f".{path.name}.tmp")
        with path.open() as lines, temporary.open("w") as file:
            for text in lines:
                try:
                    line = json.loads(text)
                    stays = line["step"] <= last_step
                except (ValueError, KeyError):
                    continue
                if stays:
                    file.write(text if text.endswith("\n") else text + "\n")
                    kept += count(line)
        temporary.replace(path)
    return kept
