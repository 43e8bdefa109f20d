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
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self._step]  # later steps are trained again
        self.path.write_text("".join(line + "\n" for line in kept))

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
