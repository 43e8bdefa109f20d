"""percentiles.csv: where the inputs of nonlinearities lie, at single steps of the run (norm/preactivations.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning

from pipeline.callbacks.step_table import StepTable
from pipeline.norm.preactivations import PERCENTS, Watch, chosen, layers
from pipeline.training.classifier import Classifier

ALL = "all"  # in place of a unit's number
COLUMNS = ("step", "layer", "unit", *(f"p{percent}" for percent in PERCENTS))
Figures = dict[str, Any]


class Activations(lightning.Callback):
    """Two lines for each watched layer at every `every_steps`-th optimizer step: its middle unit, and all units.

    For the leading rank alone, of its own share of a step's last micro-batch. Between those steps nothing is watched,
    and nothing that is trained depends on it. patterns: of layers' names; none = the last one before the classifier.
    tell: gets the same figures by their names in W&B.
    """

    def __init__(
        self, path: Path, *, every_steps: int, patterns: Sequence[str] = (),
        tell: Callable[[Figures], None] = lambda figures: None,
    ):  # fmt: skip
        self.table, self.every_steps, self.patterns, self.tell = StepTable(path, COLUMNS), every_steps, patterns, tell
        self._watch: Watch | None = None
        self._names: list[str] = []
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._step = trainer.global_step
        self.table.begin(self._step)
        names = layers(pl_module.model)
        self._names = chosen(names, self.patterns) if self.patterns else names[-1:]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        if (trainer.global_step + 1) % self.every_steps == 0 and self._watch is None:
            self._watch = Watch(pl_module.model, self._names)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._watch is None:
            return
        found = self._watch.read()
        self._watch.close()
        self._watch = None
        self.table.append(
            (self._step, layer, unit, *values)
            for layer, each in found.items()
            for unit, values in ((str(each.unit), each.of_unit), (ALL, each.of_all))
        )
        self.tell({
            f"percentiles/{layer}/{unit}/p{percent}": value
            for layer, each in found.items()
            for unit, values in (("unit", each.of_unit), (ALL, each.of_all))
            for percent, value in zip(PERCENTS, values, strict=True)
        })  # fmt: skip
