"""What a run reports, and when: rows for each reporter - metrics.csv, the terminal, and Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import lightning

from pipeline.callbacks.journal import Row
from pipeline.callbacks.throughput import Throughput
from pipeline.evaluation.metrics import Scores
from pipeline.training.classifier import Classifier


class Reporter(Protocol):
    """Takes rows as they come."""

    def append(self, row: Row) -> None: ...

    def interrupted(self) -> None: ...  # the run is about to end before its time

    def close(self) -> None: ...


class Tracking(lightning.Callback):
    """Hands a row to every reporter each `every_steps` optimizer steps and after each validation.

    All ranks merge their sums; reporters are for the leading one, the others have none.
    """

    def __init__(self, throughput: Throughput, *, every_steps: int, global_batch_size: int, images: int,
                 reporters: Sequence[Reporter]):  # fmt: skip
        self.throughput, self.every_steps, self.reporters = throughput, every_steps, reporters
        self.epochs_per_step = global_batch_size / images
        self.validated_step = -1  # the step of the last validation
        self._classifier: Classifier | None = None
        self._open_sums: list[float] | None = None
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._step, self._classifier = trainer.global_step, pl_module
        if self._open_sums is not None and trainer.is_global_zero:
            pl_module.resume_training_scores(self._open_sums)

    def state_dict(self) -> dict[str, list[float]]:
        # What was trained on since the last row, over all ranks: the next row is to cover it, too. A collective.
        return {"open_sums": self._classifier.open_training_sums() if self._classifier else []}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        self._open_sums = state_dict["open_sums"] or None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        step = trainer.global_step
        if step > self._step and step % self.every_steps == 0:
            scores = pl_module.taken_training_scores()
            images_per_s, data_wait = self.throughput.interval(step)
            rate = pl_module.schedule(step - 1)
            self._report(step, "train", scores, rate=rate, images_per_s=images_per_s, data_wait=data_wait)
        self._step = step

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if pl_module.scores is not None:
            self.validated_step = trainer.global_step
            self._report(trainer.global_step, "val", pl_module.scores)

    def _report(self, step: int, split: str, scores: Scores, **speed: float) -> None:
        row = Row(
            step=step, epoch=step * self.epochs_per_step, split=split, loss=scores.loss, top1=scores.top1,
            top5=scores.top5, images=scores.images, seconds=self.throughput.elapsed(), **speed,
        )  # fmt: skip
        for reporter in self.reporters:
            reporter.append(row)
