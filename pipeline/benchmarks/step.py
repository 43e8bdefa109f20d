"""What the promises cost a step: one training, in blocks of steps that have a feature in turn and do not.

Neighbouring blocks are compared, so that a machine that is slower now than before does not count. `deterministic`
is decided before a start: starts with it and without take turns, and their middle blocks are compared.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.table import Table

from pipeline.benchmarks.ranks import RESUMABLE, copied, started
from pipeline.callbacks.activations import Activations
from pipeline.callbacks.gradients import Gradients
from pipeline.callbacks.norms import Norms
from pipeline.callbacks.preemption import InterruptedRunError, Preemption
from pipeline.callbacks.system import System
from pipeline.callbacks.throughput import Throughput
from pipeline.callbacks.tracking import Tracking
from pipeline.training.checkpoint import Checkpoints

CHECKPOINTS, AGREEMENT, TRACKING, CLOCKS, SYSTEM, NORMS, PERCENTILES, GRADIENTS, DETERMINISTIC = _SINGLE = (
    "checkpoints", "agreement", "tracking", "clocks", "system", "norms", "percentiles", "gradients", "deterministic",
)  # fmt: skip
REPORTING, WATCHING = "reporting", "watching"  # tracking, clocks and system at once; and all three that look
FEATURES = (*_SINGLE, REPORTING, WATCHING)
_WARM_STEPS = 10
_BLOCKS_OF_A_START = 3
_LOOKS = (NORMS, PERCENTILES, GRADIENTS)
_LOOK_EVERY = 5  # steps, where looking at these is measured; otherwise it is not looked at
_QUIET = ("trainer.checkpoint_every_steps=0", "trainer.checkpoint_every_minutes=0", "trainer.validate_every_epochs=0",
          "trainer.max_steps=-1", "trainer.max_epochs=100000", "ledger=false")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of blocks without and with a feature, pair by pair."""

    feature: str
    world: int
    steps: int  # a block
    pairs: list[tuple[float, float]]

    @property
    def step_seconds(self) -> float:
        """Median, without the feature."""
        return statistics.median(off for off, _ in self.pairs) / self.steps

    @property
    def added(self) -> tuple[float, float]:
        """Mean of the seconds that the feature adds to a block, and its standard error."""
        added = [on - off for off, on in self.pairs]
        spread = statistics.stdev(added) if len(added) > 1 else math.nan
        return statistics.fmean(added), spread / math.sqrt(len(added))

    @property
    def share(self) -> tuple[float, float]:
        """The same as a fraction of the time: of a minute for checkpoints, which come once in it, else of a block."""
        of = 60.0 if self.feature == CHECKPOINTS else self.step_seconds * self.steps
        return self.added[0] / of, self.added[1] / of


def costs(
    frozen: Path,
    work: Path,
    *,
    features: Sequence[str],
    worlds: Sequence[int],
    steps: int,
    pairs: int,
    cpu_time: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cost]:
    """Measure each feature on each number of ranks. frozen: a run's directory, of which config.yaml is taken.

    work: where the copies run. steps: of a block. cpu_time: of rank 0 instead of the clock's, which other work on the
    machine disturbs; waiting does not count. Raises RuntimeError where the run does not train.
    """
    found: list[Cost] = []
    for world in worlds:
        for feature in features:
            directory = work / f"{feature}-{world}"
            if feature == DETERMINISTIC:
                words = ("trainer.deterministic=false", "trainer.deterministic=true")
                starts = [words[number % 4 in (1, 2)] for number in range(2 * max(pairs // _BLOCKS_OF_A_START, 3))]
                measured = _pairs([
                    statistics.median(_blocks(frozen, directory, world, "", steps, _BLOCKS_OF_A_START, cpu_time, word))
                    for word in starts
                ])  # fmt: skip
            else:
                blocks = _blocks(frozen, directory, world, feature, steps, 2 * pairs, cpu_time)
                measured = _pairs(blocks)
            found.append(Cost(feature, world, steps, measured))
            progress(len(found), len(features) * len(worlds))
    return found


def _pairs(seconds: list[float]) -> list[tuple[float, float]]:
    """Off and on, of neighbours that come in the order off, on, on, off: what drifts evenly adds nothing."""
    return [
        (seconds[i], seconds[i + 1]) if i % 4 == 0 else (seconds[i + 1], seconds[i]) for i in range(0, len(seconds), 2)
    ]


def report(found: Sequence[Cost]) -> Table:
    """A table of costs, with n and standard errors."""
    table = Table("feature", "processes", "ms a step without", "ms added to a block", "of the time", "n")
    for cost in found:
        added, share = cost.added, cost.share
        once = " (one a minute)" if cost.feature == CHECKPOINTS else ""
        table.add_row(
            cost.feature,
            str(cost.world),
            f"{cost.step_seconds * 1e3:.1f}",
            f"{added[0] * 1e3:.1f} ± {added[1] * 1e3:.1f} ({cost.steps} steps)",
            f"{share[0]:.2%} ± {share[1]:.2%}{once}",
            str(len(cost.pairs)),
        )
    return table


def _blocks(
    frozen: Path, directory: Path, world: int, feature: str, steps: int, count: int, cpu_time: bool, *overrides: str
) -> list[float]:
    """Seconds of so many blocks, as rank 0 sees them."""
    copied(frozen, directory)
    result = directory / "blocks.json"
    looks = [f"tracking.{look}_every_steps={_LOOK_EVERY if feature in (look, WATCHING) else 0}" for look in _LOOKS]
    looks.append(f"tracking.system_every_seconds={int(feature in (SYSTEM, REPORTING))}")
    ranks = started(
        directory,
        world,
        [*_QUIET, *looks, *overrides],
        partial(_watchers, str(result), feature, steps, count, cpu_time),
    )
    for rank in ranks:
        rank.join()
    if any(rank.exitcode != RESUMABLE for rank in ranks):
        raise RuntimeError(f"{directory}: ranks ended with {[rank.exitcode for rank in ranks]}; see its logs")
    blocks: list[float] = json.loads(result.read_text())
    return blocks


def _watchers(result: str, feature: str, steps: int, count: int, cpu_time: bool) -> Sequence[lightning.Callback]:
    return [Alternation(Path(result), feature, steps, count, time.process_time if cpu_time else time.perf_counter)]


class Alternation(lightning.Callback):
    """Times blocks of steps, a feature off, on, on, off and so forth; then ends the run."""

    def __init__(self, result: Path, feature: str, steps: int, count: int, clock: Callable[[], float]):
        self.result, self.feature, self.steps, self.count, self.clock = result, feature, steps, count, clock
        self.seconds: list[float] = []
        self._step, self._left, self._began = 0, _WARM_STEPS, math.nan

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step
        self._switch(trainer, on=False)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._left -= 1
        if self._left:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = self.clock()
        if not math.isnan(self._began):
            self.seconds.append(now - self._began)
        if len(self.seconds) == self.count:
            if trainer.is_global_zero:
                self.result.write_text(json.dumps(self.seconds))
            raise InterruptedRunError("measured")
        self._begin(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.num_training_batches >= 2 * self.steps * trainer.accumulate_grad_batches:
            self._begin(trainer)  # anew: an epoch's end saves, and starts the loader again; short epochs cannot matter

    def _begin(self, trainer: lightning.Trainer) -> None:
        self._left, self._began = self.steps, self.clock()
        self._switch(trainer, on=len(self.seconds) % 4 in (1, 2))

    def _switch(self, trainer: lightning.Trainer, *, on: bool) -> None:
        """Set the state of the feature; a checkpoint is written at the beginning of its block."""
        if self.feature == CHECKPOINTS and on:
            _of(trainer, Checkpoints).save(trainer)
        if self.feature in (SYSTEM, REPORTING):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, System):  # of the first rank of the node alone
                    callback.stop()
                    if on:
                        callback.start()
        for kind in _WATCHERS.get(self.feature, ()):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, kind):  # of the leading rank alone, some of them
                    _set_hooks(callback, on=on)


def _of(trainer: lightning.Trainer, kind: type[Any]) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]


_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
_WATCHERS: dict[str, tuple[type[lightning.Callback], ...]] = {
    AGREEMENT: (Preemption,), TRACKING: (Tracking,), CLOCKS: (Throughput,), NORMS: (Norms,),
    PERCENTILES: (Activations,), GRADIENTS: (Gradients,),
    REPORTING: (Tracking, Throughput), WATCHING: (Norms, Activations, Gradients),
}  # fmt: skip


def _set_hooks(callback: lightning.Callback, *, on: bool) -> None:
    """Let a callback see the steps, or not."""
    for name in _HOOKS:
        callback.__dict__.pop(name, None)
        if not on:
            setattr(callback, name, _nothing)


def _nothing(*_: object, **__: object) -> None:
    """In place of a hook."""
