"""What is watched through single steps of a run, and written down."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

import lightning
from torch import nn

from pipeline.callbacks.step_table import StepTable
from pipeline.training.classifier import Classifier


class Watch(Protocol):
    """Sees the training batches of a network until it is closed."""

    def close(self) -> None: ...


W = TypeVar("W", bound=Watch)


class Look(lightning.Callback, Generic[W]):
    """Watches the network through every `every_steps`-th optimizer step. For the leading rank.

    Between those steps nothing is watched. What is seen is of a step's last micro-batch.
    """

    def __init__(self, table: StepTable, every_steps: int):
        self.table, self.every_steps = table, every_steps
        self._watch: W | None = None
        self._step = 0

    def watch(self, model: nn.Module) -> W:
        """Begin to watch."""
        raise NotImplementedError

    def write(self, step: int, watch: W) -> None:
        """What was seen in that step."""
        raise NotImplementedError

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self.table.begin(self._step)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        if (trainer.global_step + 1) % self.every_steps == 0 and self._watch is None:
            self._watch = self.watch(pl_module.model)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._watch is not None:
            watch, self._watch = self._watch, None
            self.write(self._step, watch)
            watch.close()
