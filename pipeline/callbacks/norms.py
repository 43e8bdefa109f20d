"""norms.csv: how the norms of a network are doing, layer by layer, at single steps of the run (norm/health.py)."""

from __future__ import annotations

from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import lightning

from pipeline.callbacks.step_table import StepTable
from pipeline.norm.health import Health, Watch
from pipeline.training.classifier import Classifier

COLUMNS = ("step", "layer", *(f.name for f in fields(Health)))


class Norms(lightning.Callback):
    """A line for each norm at every `every_steps`-th optimizer step. For the leading rank: the others see the same.

    Between those steps nothing is watched. The figures are of a step's last micro-batch, in four digits.
    """

    def __init__(self, path: Path, *, every_steps: int):
        self.table, self.every_steps = StepTable(path, COLUMNS), every_steps
        self._watch: Watch | None = None
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self.table.begin(self._step)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        if (trainer.global_step + 1) % self.every_steps == 0 and self._watch is None:
            self._watch = Watch(pl_module.model)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._watch is None:
            return
        figures = self._watch.read()
        self._watch.close()
        self._watch = None
        self.table.append((self._step, layer, *map(float, astuple(health))) for layer, health in figures.items())
