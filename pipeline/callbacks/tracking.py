"""What a run reports, and when: rows for each reporter - metrics.csv, the terminal, and Weights & Biases."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import lightning
import torch

from pipeline.callbacks.journal import Row
from pipeline.callbacks.stragglers import Stragglers
from pipeline.callbacks.throughput import Spent, Throughput
from pipeline.evaluation.metrics import Scores
from pipeline.training.classifier import Classifier


class Reporter(Protocol):
    """Takes rows as they come."""

    def append(self, row: Row) -> None: ...

    def interrupted(self) -> None: ...  # the run is about to end before its time

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Circumstance:
    """Where a start happens. began: seconds since 1970, when the run first began.

    operations: of a step for an image, epoch by epoch, the last one's for all later ones, on a device that can do
    `peak` a second; () or 0 where one is not known.
    """

    ranks: int = 1
    nodes: int = 1
    began: float = 0.0
    operations: tuple[float, ...] = ()
    peak: float = 0.0


class Tracking(lightning.Callback):
    """Hands a row to every reporter each `every_steps` optimizer steps and after each validation.

    All ranks merge their sums; reporters and stragglers are for the leading one, the others have none.
    """

    def __init__(self, throughput: Throughput, *, every_steps: int, global_batch_size: int, images: int,
                 circumstance: Circumstance, reporters: Sequence[Reporter],
                 stragglers: Stragglers | None = None):  # fmt: skip
        self.stragglers = stragglers
        self.throughput, self.every_steps, self.reporters = throughput, every_steps, reporters
        self.circumstance, self.global_batch_size = circumstance, global_batch_size
        self.epochs_per_step, self.steps_per_epoch = global_batch_size / images, images // global_batch_size
        self.validated_step = -1  # the step of the last validation
        self._classifier: Classifier | None = None
        self._open_sums: list[float] | None = None
        self._useful = 0.0  # seconds in steps that rows tell of, over all starts
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._step, self._classifier = trainer.global_step, pl_module
        if self.stragglers is not None:
            self.stragglers.begin(self._step)
        if self._open_sums is not None and trainer.is_global_zero:
            pl_module.resume_training_scores(self._open_sums)

    def state_dict(self) -> dict[str, Any]:
        # What was trained on since the last row, over all ranks: the next row is to cover it, too. A collective.
        if self._classifier is None:
            return {"open_sums": []}
        spent = self.throughput.open_interval(self._classifier.device)
        return {"open_sums": self._classifier.open_training_sums(), "open_seconds": list(astuple(spent)),
                "useful_seconds": self._useful}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._open_sums = state_dict["open_sums"] or None
        self._useful = state_dict.get("useful_seconds", 0.0)  # checkpoints of older versions have no clocks
        self.throughput.load(Spent(*state_dict.get("open_seconds", ())))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        step = trainer.global_step
        if step > self._step and step % self.every_steps == 0:
            scores = pl_module.taken_training_scores()
            spent = self.throughput.interval(pl_module.device)
            self._useful += spent.step
            ranks = self.stragglers.add(step, self.throughput.steps, self.throughput.by_rank) if self.stragglers else {}
            self._report(step, "train", scores, pl_module.device, rate=pl_module.schedule(step - 1),
                         **self._speed(step, scores.images, spent), **ranks)  # fmt: skip
        self._step = step

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if pl_module.scores is not None:
            self.validated_step = trainer.global_step
            beside = pl_module.scores_beside
            running = {f"running_{name}": getattr(beside, name) for name in ("loss", "top1", "top5")} if beside else {}
            trained = pl_module.trained_scores
            both = {f"trained_{name}": getattr(trained, name) for name in ("loss", "top1", "top5")} if trained else {}
            self._report(trainer.global_step, "val", pl_module.scores, pl_module.device,
                         span=self.throughput.validation(), **running, **both)  # fmt: skip

    def _speed(self, step: int, images: int, spent: Spent) -> dict[str, float | None]:
        here, span = self.circumstance, max(spent.span, 1e-9)
        operations = 0.0  # of an image in the mean of the row's steps: images may grow with the epochs
        if here.operations:
            epochs = [(s // max(self.steps_per_epoch, 1)) for s in range(max(step - self.every_steps, 0), step)]
            operations = sum(here.operations[min(e, len(here.operations) - 1)] for e in epochs) / len(epochs)
        images_per_s = images / span
        return {
            "images_per_s": images_per_s,
            "data_wait": spent.data / span,
            "statistics_wait": spent.statistics / span,
            "gradient_wait": spent.gradients / span,
            "checkpoint_wait": spent.checkpoint / span,
            "span": spent.span,
            "mfu": images_per_s * operations / (here.peak * here.ranks) if here.peak and operations else None,
        }

    def _report(self, step: int, split: str, scores: Scores, device: torch.device, **speed: float | None) -> None:
        here, now = self.circumstance, time.time()
        row = Row(
            step=step, epoch=step * self.epochs_per_step, split=split, loss=scores.loss, top1=scores.top1,
            top5=scores.top5, images=scores.images, seconds=self.throughput.elapsed(),
            samples=step * self.global_batch_size, memory_gb=_memory_gb(device),
            goodput=self._useful / max(now - here.began, 1e-9), at=round(now, 3), ranks=here.ranks, nodes=here.nodes,
            **speed,
        )  # fmt: skip
        for reporter in self.reporters:
            reporter.append(row)


def _memory_gb(device: torch.device) -> float:
    """The most that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
