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
        self.path, self.keys_of = directory / f"rank-{rank}.jsonl", keys
        self._samples: list[int] = []
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut(self.path, self._step)
        if trainer.is_global_zero:  # files of ranks that this start does not have
            for path in self.path.parent.glob("rank-*.jsonl"):
                if int(path.stem.partition("-")[2]) >= trainer.world_size:
                    _cut(path, self._step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._samples += batch.sample_N.tolist()
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            line = {"epoch": trainer.current_epoch, "step": self._step, "keys": self.keys_of(self._samples)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._samples = []


def _cut(path: Path, last_step: int) -> None:
    """Take out what will be trained again, and a last line that a crash cut short."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
