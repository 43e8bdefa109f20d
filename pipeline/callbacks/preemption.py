"""Stopping early, on a signal or past the budget of bad samples: all ranks agree between two steps, save, and leave.

A signal's handler sets a flag and nothing else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning

from pipeline.callbacks.agreement import Agreement
from pipeline.callbacks.bad_samples import BadSamples
from pipeline.callbacks.losses import Losses
from pipeline.data.shards import DataError
from pipeline.training.checkpoint import Checkpoints, ends_epoch
from pipeline.training.checkpoint_io import CheckpointError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class InterruptedRunError(Exception):
    """A signal ended the run; the same command goes on from its newest checkpoint."""


class SameStart(lightning.Callback):
    """Before anything else that ranks do together: they go on from the same step. Begins their agreement.

    node: the number of this rank's. machine: what that is, in a line. tell: gets both of all ranks, in their order, on
    every rank.
    """

    def __init__(
        self,
        agreement: Agreement,
        timeout: timedelta,
        *,
        node: int = 0,
        machine: str = "",
        tell: Callable[[list[tuple[int, str]]], object] = lambda machines: None,
    ):
        self.agreement, self.timeout, self.node, self.machine, self.tell = agreement, timeout, node, machine, tell

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.agreement.begin(self.timeout)
        found = self.agreement.gather((trainer.global_step, self.node, self.machine))
        steps = sorted({step for step, *_ in found})
        if len(steps) > 1:
            raise CheckpointError(
                f"ranks go on from different checkpoints, of steps {steps}: run.dir must be one directory that all "
                "nodes see"
            )
        self.tell([(node, machine) for _, node, machine in found])


class Preemption(lightning.Callback):
    """Looks at flag, count and clock between steps.

    is_done: whether nothing is left to do after the last step. on_interruption: told before the last checkpoint is
    written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        bad_samples: BadSamples,
        losses: Losses,
        *,
        is_done: Callable[[lightning.Trainer], bool] = lambda trainer: True,
        on_interruption: Callable[[], object] = lambda: None,
    ):
        self.checkpoints, self.bad_samples, self.losses = checkpoints, bad_samples, losses
        self.is_done, self.on_interruption = is_done, on_interruption
        self.agreement = losses.agreement
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Lightning also broadcasts a flag before every batch and waits for it; the agreement takes its place.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for number, handler in self._before.items():  # nobody asks for the flag from here on
            signal.signal(number, handler)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or ends_epoch(trainer):
            return
        self._step = step
        sums = self.agreement.ask(self._values(trainer))
        if sums is None:
            return
        signals, bad, due, unsound = sums
        if unsound:
            self.losses.refuse(trainer)
        try:
            self.bad_samples.check(round(bad))
        except DataError:
            self.checkpoints.save(trainer, wait=True)
            raise
        if signals:
            self._leave(trainer, f"after step {step}")
        if due:
            self.checkpoints.save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # The checkpoint of the epoch's end is on its way already: Checkpoints comes before us.
        signals, bad, *_ = self.agreement.settle(self._values(trainer))
        self.bad_samples.check(round(bad))
        if signals and not (trainer.fit_loop.done and self.is_done(trainer)):
            self.on_interruption()
            raise InterruptedRunError(f"interrupted after step {trainer.global_step}; its checkpoint is written")

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.state.fn != "fit":
            return
        sums = self.agreement.ask(self._values(trainer))
        if sums is not None and sums[0]:
            self._leave(trainer, f"in the validation after step {trainer.global_step}, which will be repeated")

    def _leave(self, trainer: lightning.Trainer, where: str) -> None:
        self.on_interruption()
        failure = self.checkpoints.save(trainer, wait=True)
        written = f"could not be written ({failure})" if failure else "is written"
        raise InterruptedRunError(f"interrupted {where}; its checkpoint {written}")

    def _values(self, trainer: lightning.Trainer) -> list[float]:
        due = trainer.is_global_zero and self.checkpoints.due()
        return [float(self.signal is not None), float(self.bad_samples.count), float(due), float(self.losses.unsound())]

    def _note(self, number: int, frame: object) -> None:
        if self.signal == signal.SIGINT == number:  # a second Ctrl-C: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number


def _nothing() -> None:
    """No broadcast."""
