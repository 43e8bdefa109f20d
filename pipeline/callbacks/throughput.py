"""Where the time of a training goes: the phases of its pulse, and what of them is waiting for other ranks.

On a CPU the clock of the host says it at every step. On a GPU the host runs ahead of the device: what ranks wait for
one another is read off events of its stream, at the last step before a row, and stands for all steps of the row.
"""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from typing import Any

import lightning
import torch

from pipeline.callbacks.bad_samples import sum_over_ranks
from pipeline.callbacks.stragglers import Times
from pipeline.launch.pulse import Pulse
from pipeline.norm.waiting import STATISTICS, Waiting

STEP = ("forward", "backward", "gradients", "optimizer")  # phases of the pulse that are a step's own
VALIDATION = ("statistics", "validation")


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one stretch of training, validations left out; ranks are averaged.

    step: in steps, waiting for others in them included. statistics, gradients: standing in collectives of batch
    statistics and of gradients. data: waiting for a batch. checkpoint: of the training, not of the thread that writes.
    """

    step: float = 0.0
    statistics: float = 0.0
    gradients: float = 0.0
    data: float = 0.0
    checkpoint: float = 0.0

    @property
    def span(self) -> float:
        """All of it; statistics and gradients are parts of step."""
        return self.step + self.data + self.checkpoint

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Throughput(lightning.Callback):
    """Clocks of the training loop, each of one rank. every_steps: between rows, of which the last is looked at closely.

    pulse: moved by the watchdog. by_rank: of all ranks, in the `steps` optimizer steps of the last interval that this
    start took.
    """

    def __init__(self, pulse: Pulse, *, every_steps: int, rank: int = 0, world: int = 1):
        self.pulse, self.every_steps, self.rank, self.world = pulse, every_steps, rank, world
        self.by_rank: list[Times] = []
        self.steps = 0
        self._started = time.perf_counter()
        self._taken = self._validated = pulse.spent()
        self._gradients = Waiting()
        self._mark: Any = None
        self._is_cuda = False
        self._steps = self._watched = 0
        self._waited = [0.0, 0.0]  # seen at the steps that were watched: for statistics, for gradients
        self._step = 0
        self._carried = Spent()  # of steps of an earlier start that no row covers yet

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started, self._step = time.perf_counter(), trainer.global_step
        self._taken = self._validated = self.pulse.spent()
        self._is_cuda = pl_module.device.type == "cuda"
        first = next((p for p in pl_module.parameters() if p.requires_grad), None)
        if self._is_cuda and first is not None:  # the last to get its gradient, see Watchdog
            first.register_post_accumulate_grad_hook(self._gradients_are_there)  # type: ignore[no-untyped-call]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # 66 exchanges a step: two events each would be felt at every step of a GPU, two looks at a clock are not.
        STATISTICS.on = self._gradients.on = not self._is_cuda or (trainer.global_step + 1) % self.every_steps == 0

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Any
    ) -> None:
        self._gradients.end(self._mark)
        self._mark = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._steps += 1
            self._watched += STATISTICS.on
            STATISTICS.on = self._gradients.on = False

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        STATISTICS.on = False  # in the middle of a step: whoever trains next in this process starts afresh

    def _gradients_are_there(self, parameter: torch.Tensor) -> None:
        self._mark = self._gradients.begin(parameter.device)  # of the last micro-batch: those before it wait for nobody

    def elapsed(self) -> float:
        """Seconds since training started in this process."""
        return time.perf_counter() - self._started

    def interval(self, device: torch.device) -> Spent:
        """What went by since the last call, which ends the interval. A collective, and a wait for the device."""
        spent = self.open_interval(device)
        self._taken = self.pulse.spent()
        self._carried = Spent()
        self._steps = self._watched = 0
        self._waited = [0.0, 0.0]
        return spent

    def open_interval(self, device: torch.device) -> Spent:
        """The same, with the interval left open. A collective, and a wait for the device."""
        now = self.pulse.spent()
        passed = {phase: now[phase] - self._taken[phase] for phase in now}
        for i, waiting in enumerate((STATISTICS, self._gradients)):
            self._waited[i] += waiting.taken()
        statistics, gradients = (seconds * self._steps / max(self._watched, 1) for seconds in self._waited)
        own = Spent(
            step=sum(passed[phase] for phase in STEP),
            statistics=statistics,
            gradients=gradients if self._is_cuda else passed["gradients"],
            data=passed["loading"],
            checkpoint=passed["checkpoint"],
        )
        # Each rank's own figures travel in the same reduction, in places that are 0 on all others.
        places = [0.0] * (2 * self.world)
        places[2 * self.rank : 2 * self.rank + 2] = max(own.step - own.statistics - own.gradients, 0.0), own.data
        clocks = astuple(own)
        sums = sum_over_ranks([*clocks, *places], device)
        self.by_rank = [Times(*sums[at : at + 2]) for at in range(len(clocks), len(sums), 2)]
        self.steps = self._steps
        return self._carried + Spent(*(seconds / self.world for seconds in sums[: len(clocks)]))

    def validation(self) -> float:
        """Seconds in validation and in the estimate of statistics before it, since the last call; of this rank."""
        now, before = self.pulse.spent(), self._validated
        self._validated = now
        return sum(now[phase] - before[phase] for phase in VALIDATION)

    def load(self, carried: Spent) -> None:
        """Go on from an interval that was open when a checkpoint was written."""
        self._carried = carried
