"""Stopping early, on a signal or past the budget of bad samples: all ranks agree between two steps, save, and leave.

A signal's handler sets a flag and nothing else.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning

from pipeline.callbacks.bad_samples import BadSamples, sum_over_ranks
from pipeline.data.shards import DataError
from pipeline.training.checkpoint import Checkpoints, ends_epoch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class InterruptedRunError(Exception):
    """A signal ended the run after a checkpoint; the same command goes on from there."""


class Preemption(lightning.Callback):
    """Looks at flag and count after every optimizer step, with one small reduction over all ranks."""

    def __init__(self, checkpoints: Checkpoints, bad_samples: BadSamples):
        self.checkpoints, self.bad_samples = checkpoints, bad_samples
        self.signal: int | None = None
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        for number in SIGNALS:  # in place of Lightning's own, which save inside the handler
            signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or ends_epoch(trainer):
            return
        self._step = step
        signals, bad = sum_over_ranks([self.signal is not None, self.bad_samples.count], pl_module.device)
        try:
            self.bad_samples.check(round(bad))
            if signals:
                raise InterruptedRunError(f"interrupted after step {step}; its checkpoint is written")
        except (DataError, InterruptedRunError):
            self.checkpoints.save(trainer)
            raise

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # The checkpoint of the epoch's end is written already: Checkpoints comes before us.
        signals, bad = sum_over_ranks([self.signal is not None, self.bad_samples.count], pl_module.device)
        self.bad_samples.check(round(bad))
        if signals and not trainer.fit_loop.done:
            raise InterruptedRunError(f"interrupted after step {trainer.global_step}; its checkpoint is written")

    def _note(self, number: int, frame: object) -> None:
        if self.signal == signal.SIGINT == number:  # a second Ctrl-C: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
