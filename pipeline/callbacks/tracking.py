"""What a run reports, and where: metrics.csv always, the terminal, and Weights & Biases through its own client."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning
import wandb

from pipeline.callbacks.journal import Row
from pipeline.callbacks.throughput import Throughput
from pipeline.evaluation.metrics import Scores
from pipeline.training.classifier import Classifier

RESUMABLE = 75  # the exit code by which W&B knows a preempted run from a failed one


class TrackingError(Exception):
    """W&B cannot be had as asked for."""


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


@dataclass(frozen=True, slots=True)
class WandbPlace:
    """Where a run belongs in W&B. id: kept in run.json, so that a resumed run goes on in the same place."""

    id: str
    name: str
    project: str
    entity: str | None
    group: str | None
    tags: Sequence[str]


class WandbReporter:
    """One W&B run. Steps are our own metric, so that a repeated stretch after a resume overlays and nothing shifts."""

    def __init__(self, place: WandbPlace, *, directory: Path, mode: str, config: dict[str, Any]):
        self.mode = wandb_mode(mode)
        self._exit_code = 0
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            self.run = self._init(place, directory, config)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            if mode == "online":
                reason = str(error).splitlines()[0]
                raise TrackingError(f"{reason}; set WANDB_API_KEY, or choose tracking.mode=offline") from None
            self.mode = f"offline ({str(error).splitlines()[0]})"
            self.run = self._init(place, directory, config)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _init(self, place: WandbPlace, directory: Path, config: dict[str, Any]) -> Any:
        return wandb.init(
            id=place.id, name=place.name, project=place.project, entity=place.entity, group=place.group,
            tags=list(place.tags), dir=str(directory.resolve()), config=config, resume="allow",
            mode=self.mode.partition(" ")[0],  # type: ignore[arg-type]
            settings=wandb.Settings(init_timeout=60, console="off"),
        )  # fmt: skip

    def append(self, row: Row) -> None:
        values = {"loss": row.loss, "top1": row.top1, "top5": row.top5, "rate": row.rate,
                  "images_per_s": row.images_per_s, "data_wait": row.data_wait}  # fmt: skip
        named = {f"{row.split}/{name}": value for name, value in values.items() if value is not None}
        self.run.log({"step": row.step, "epoch": row.epoch, **named})

    def interrupted(self) -> None:
        self.run.mark_preempting()
        self._exit_code = RESUMABLE

    def close(self) -> None:
        self.run.finish(exit_code=self._exit_code)


def wandb_mode(mode: str) -> str:
    """`auto` becomes online where a key is at hand, else offline; the others are taken as they are."""
    if mode != "auto":
        return mode
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    service = os.environ.get("WANDB_BASE_URL", "")
    return any(
        "wandb" in host or host.endswith("forge.coreweave.com") or (service and host in service) for host in hosts
    )
