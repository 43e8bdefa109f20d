"""Stopping on a signal: the handler sets a flag, all ranks agree between two steps, save, and leave together."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning
import torch
import torch.distributed as dist

from pipeline.training.checkpoint import Checkpoints, ends_epoch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class InterruptedRunError(Exception):
    """A signal ended the run after a checkpoint; the same command goes on from there."""


class Preemption(lightning.Callback):
    """Looks at the flag after every optimizer step, with one small reduction over all ranks."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
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
        if self._any_rank(pl_module.device):
            self.checkpoints.save(trainer)
            raise InterruptedRunError(f"interrupted after step {step}; its checkpoint is written")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # The checkpoint of the epoch's end is written already: Checkpoints comes before us.
        if not trainer.fit_loop.done and self._any_rank(pl_module.device):
            raise InterruptedRunError(f"interrupted after step {trainer.global_step}; its checkpoint is written")

    def _note(self, number: int, frame: object) -> None:
        if self.signal == signal.SIGINT == number:  # a second Ctrl-C: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number

    def _any_rank(self, device: torch.device) -> bool:
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self.signal is not None
        flag = torch.tensor(float(self.signal is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
