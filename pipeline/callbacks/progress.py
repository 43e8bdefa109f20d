"""Progress in the terminal: a bar where there is one, a line every ten seconds where output goes to a file."""

from __future__ import annotations

import time
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.callbacks.journal import Row

_LINE_SECONDS = 10.0


class ProgressReport(lightning.Callback):
    """Steps done of `steps`, speed, share of time waiting for data, loss, accuracy, time left. A Reporter, too."""

    def __init__(self, console: Console, *, steps: int):
        self.console, self.steps = console, steps
        self._train: Row | None = None
        self._validation: Row | None = None
        self._printed = self._started = time.monotonic()
        self._first_step = 0
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
            console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=120,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, figures="")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._first_step, self._started = trainer.global_step, time.monotonic()
        self._bar.update(self._task, completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._bar.update(self._task, completed=trainer.global_step, figures=self._figures())
        now = time.monotonic()
        if not self.console.is_terminal and now - self._printed > _LINE_SECONDS and self._train:
            self._printed = now
            done = trainer.global_step - self._first_step
            left = (now - self._started) / max(done, 1) * (self.steps - trainer.global_step)
            self.console.print(f"step {trainer.global_step}/{self.steps}  {self._figures()}  {left / 60:.1f} min left",
                               soft_wrap=True)  # fmt: skip

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._bar.update(self._task, figures="population statistics and validation ...")

    def append(self, row: Row) -> None:
        if row.split == "train":
            self._train = row
            return
        self._validation = row
        self.console.print(
            f"epoch {row.epoch:.2f}  step {row.step}  validation top-1 {row.top1:.2%}  top-5 {row.top5:.2%}  "
            f"loss {row.loss:.4f}  ({row.images} images)"
            + ("" if row.running_top1 is None else f"  with running averages top-1 {row.running_top1:.2%}"),
            highlight=False,
            soft_wrap=True,
        )

    def interrupted(self) -> None:
        """The message of the end says it."""

    def close(self) -> None:
        self._bar.stop()

    def _figures(self) -> str:
        row = self._train
        if row is None:
            return ""
        text = (
            f"{row.images_per_s:.0f} images/s  waiting {row.data_wait:.0%}  loss {row.loss:.3f}  top-1 {row.top1:.1%}"
        )
        return text + (f"  val {self._validation.top1:.2%}" if self._validation else "")


class EvaluationProgress:
    """Images evaluated of `total`, images a second, time left: a bar, or a line every ten seconds.

    done: how many were evaluated before, which count for no speed.
    """

    def __init__(self, console: Console, total: int, done: int):
        self.console, self.total, self._before, self._done = console, total, done, done
        self._printed = time.monotonic()
        self._began: float | None = None
        self._bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"), BarColumn(),
            TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("evaluate", total=total, completed=done, figures="loading ...")

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self) -> None:
        """The first image is about to be evaluated."""
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """What is done before the first image."""
        self._show(text)

    def at(self, done: int) -> None:
        """How many images are evaluated by now."""
        self._done = max(self._done, min(done, self.total))
        seconds = time.monotonic() - (self._began or time.monotonic())
        speed = (self._done - self._before) / seconds if seconds else 0.0
        left = f"  {_duration((self.total - self._done) / speed)} left" if speed else ""
        self._show(f"{speed:,.1f} images/s{left}")

    def _show(self, figures: str) -> None:
        self._bar.update(self._task, completed=self._done, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._printed > _LINE_SECONDS:
            self._printed = now
            self.console.print(f"{self._done:,} of {self.total:,} images  {figures}", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"
