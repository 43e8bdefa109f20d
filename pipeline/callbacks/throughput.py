"""Images a second, and the share of the time in which a step waited for its data."""

from __future__ import annotations

import time
from typing import Any

import lightning


class Throughput(lightning.Callback):
    """Clocks of the training loop. Waiting is the time between the end of one batch and the start of the next."""

    def __init__(self, global_batch_size: int):
        self.global_batch_size = global_batch_size
        self.started = time.perf_counter()
        self.restart(step=0)

    def restart(self, step: int) -> None:
        """Begin a new interval at this step."""
        self._since = self._batch_ended = time.perf_counter()
        self._waited, self._step = 0.0, step

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.started = time.perf_counter()
        self.restart(trainer.global_step)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.restart(trainer.global_step)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_ended = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since training started in this process."""
        return time.perf_counter() - self.started

    def interval(self, step: int) -> tuple[float, float]:
        """(images/s over all ranks, share of the time waited for data) since the last call, which ends the interval."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        result = (step - self._step) * self.global_batch_size / elapsed, self._waited / elapsed
        self.restart(step)
        return result
