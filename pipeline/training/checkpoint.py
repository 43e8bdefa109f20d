"""When checkpoints are written, which are kept, and from which a run goes on."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning

from pipeline.evaluation.metrics import Scores
from pipeline.training.checkpoint_io import TEMPORARY, CheckpointError, CheckpointFiles, damage
from pipeline.training.classifier import Classifier

BEST = "best.ckpt"
POSITION = "ImageData"  # where Lightning keeps the data module's state
_UNVALIDATED = "validation_is_due"
_NAME = re.compile(r"step-(\d{8})\.ckpt")


class Checkpoints(lightning.Callback):
    """Saves each `every_steps` optimizer steps (0 = never) and at each epoch's end; keeps `keep` and the best.

    every_minutes is asked for by `due`, which the leading rank answers: clocks differ, and all ranks save together.
    say: tells of a save that did not succeed.
    """

    def __init__(
        self,
        directory: Path,
        files: CheckpointFiles,
        *,
        every_steps: int,
        every_minutes: float = 0.0,
        keep: int,
        say: Callable[[str], None] = print,
    ):
        self.directory, self.files, self.say = directory, files, say
        self.every_steps, self.every_minutes, self.keep = every_steps, every_minutes, keep
        self.before: Callable[[lightning.Trainer], object] = lambda trainer: None  # a save; may refuse by raising
        self.best_top1 = -1.0
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._unvalidated = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if self._unvalidated:  # the checkpoint was written in the middle of the validation of an epoch's end
            self._unvalidated = False
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True
            self.save(trainer, best=self._is_best(pl_module.scores))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Only here, between two optimizer steps, is the loader's position exact. After an epoch's last step the
        # validation comes first: Lightning would take a checkpoint from before it for one from after it.
        step = trainer.global_step
        if ends_epoch(trainer) or step == self._saved_step:
            return
        if step == trainer.max_steps or (self.every_steps and step % self.every_steps == 0):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if not ends_epoch(trainer):  # max_steps cut it short: saved at that step, in the middle of the epoch
            return
        self.save(trainer, best=self._is_best(pl_module.scores))

    def keep_best(self, trainer: lightning.Trainer, scores: Scores | None) -> None:
        """Keep a copy of the newest checkpoint if its scores are the best so far."""
        self.files.finish()
        found = checkpoints(self.directory)
        if self._is_best(scores) and trainer.is_global_zero and found:
            _copy(found[-1], self.directory / BEST)

    def finish(self) -> None:
        """Wait for the last write. Raises CheckpointError if it failed."""
        self.files.finish()
        failure = self._complain()
        if failure:
            raise CheckpointError(
                f"the training is done, but its last checkpoint could not be written ({failure}); make room, and the "
                "same command goes on from the newest"
            )

    def due(self) -> bool:
        """Whether the last save is `every_minutes` ago."""
        return 0 < self.every_minutes * 60 <= time.monotonic() - self._saved_at

    def _is_best(self, scores: Scores | None) -> bool:
        if scores is None or scores.top1 <= self.best_top1:
            return False
        self.best_top1 = scores.top1
        return True

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning counts micro-batches. Another number of them a step (other ranks, another micro-batch) must not
        # move the place in the epoch, which the data module keeps in images.
        position = checkpoint[POSITION]
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        self._unvalidated = checkpoint[_UNVALIDATED]
        if progress["is_last_batch"]:  # an epoch's end is stored as the start of the next, for Lightning too
            progress["is_last_batch"] = False
            progress["current"] = dict.fromkeys(progress["current"], 0)
            for counts in loops["epoch_progress"].values():
                counts.update(dict.fromkeys(counts, counts["processed"] + self._unvalidated))
            validated = loops["epoch_loop.val_loop.batch_progress"]
            validated["current"] = dict.fromkeys(validated["current"], 0)
            return
        steps = position["sample"] // position["global_batch_size"]
        moved = steps * trainer.accumulate_grad_batches - progress["current"]["ready"]
        for counts in (progress["current"], progress["total"]):
            for stage in counts:
                counts[stage] += moved

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_UNVALIDATED] = trainer.validating

    def state_dict(self) -> dict[str, float]:
        return {"best_top1": self.best_top1}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best_top1 = state_dict["best_top1"]

    def save(self, trainer: lightning.Trainer, *, best: bool = False, wait: bool = False) -> str:
        """Save this step, and remove files beyond `keep` once it is on disk. Every rank must call it.

        best: keep a copy as the best. wait: until it is on disk; returns then why it is not, or "".
        """
        self.before(trainer)
        path = self.directory / f"step-{trainer.global_step:08d}.ckpt"
        self.files.finish()
        self._complain()
        trainer.save_checkpoint(path, storage_options=partial(_tidy, path, self.keep, best))
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if wait:
            self.files.finish()
        return self._complain() if wait else ""

    def _complain(self) -> str:
        failure, self.files.failure = self.files.failure, ""
        if failure:
            found = checkpoints(self.directory)
            self.say(f"WARNING: a checkpoint could not be written, {failure}; "
                     f"{f'{found[-1].name} stays the newest' if found else 'there is none yet'}")  # fmt: skip
        return failure


def _tidy(path: Path, keep: int, best: bool) -> None:
    if best:
        _copy(path, path.with_name(BEST))
    for old in checkpoints(path.parent)[:-keep]:
        old.unlink(missing_ok=True)


def _copy(path: Path, to: Path) -> None:
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(path, temporary)
        temporary.replace(to)
    finally:
        temporary.unlink(missing_ok=True)


def ends_epoch(trainer: lightning.Trainer) -> bool:
    """Whether the batch just trained on is the last of its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def clear(directory: Path) -> None:
    """Remove what killed processes left half-written. To be called by whoever holds the directory."""
    for path in directory.glob(TEMPORARY):
        writer = path.suffixes[-2][1:]  # of an earlier start, it may be about to end this very file
        if not Path("/proc", writer).exists():
            path.unlink(missing_ok=True)


def checkpoints(directory: Path) -> list[Path]:
    """A run's numbered checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*.ckpt") if _NAME.fullmatch(path.name))


def newest(directory: Path, identity: Mapping[str, Any] | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of the run, None where there is no file at all; and why newer files are not.

    Raises CheckpointError where none is whole, or one is of a newer format.
    """
    found, faults = checkpoints(directory), dict[Path, str]()
    for path in reversed(found):
        fault = damage(path, identity)
        if not fault:
            return path, faults
        faults[path] = fault
    if found:
        raise CheckpointError(
            f"{directory} holds {len(found)} checkpoints and none to go on from ({found[-1].name} is "
            f"{faults[found[-1]]}); bring one back, or remove them and start again"
        )
    return None, faults


def set_aside(path: Path) -> Path:
    """Rename a file that is no checkpoint of this run, so that it neither counts as the newest nor is lost."""
    names = (f"{path.name}.set-aside{f'-{number}' if number else ''}" for number in itertools.count())
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(aside)
