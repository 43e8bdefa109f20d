"""Checkpoints: whole or absent on disk, loaded without running code, the newest few and the best kept."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from pipeline.evaluation.metrics import Scores
from pipeline.training.classifier import Classifier

BEST = "best.ckpt"
POSITION = "ImageData"  # where Lightning keeps the data module's state
_NAME = re.compile(r"step-(\d{8})\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file, flushes it to disk and renames it; loads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        final = Path(path)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
            directory = os.open(final.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # the rename itself
            finally:
                os.close(directory)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return checkpoint


class Checkpoints(lightning.Callback):
    """Saves every `every_steps` optimizer steps (0 = never) and at each epoch's end; keeps `keep` and the best."""

    def __init__(self, directory: Path, *, every_steps: int, keep: int):
        self.directory, self.every_steps, self.keep = directory, every_steps, keep
        self.best_top1 = -1.0
        self._saved_step = 0

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
        self.save(trainer)
        self.keep_best(trainer, pl_module.scores)

    def keep_best(self, trainer: lightning.Trainer, scores: Scores | None) -> None:
        """Keep a copy of the checkpoint just written if its scores are the best so far."""
        path = newest(self.directory)
        if scores is None or scores.top1 <= self.best_top1 or path is None:
            return
        self.best_top1 = scores.top1
        if trainer.is_global_zero:
            copy = self.directory / f".{BEST}.{os.getpid()}.tmp"
            shutil.copyfile(path, copy)
            copy.replace(self.directory / BEST)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning counts micro-batches. Another number of them a step (other ranks, another micro-batch) must not
        # move the place in the epoch, which the data module keeps in images.
        position = checkpoint[POSITION]
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        if progress["is_last_batch"]:  # an epoch's end is stored as the start of the next, for Lightning too
            progress["is_last_batch"] = False
            progress["current"] = dict.fromkeys(progress["current"], 0)
            for counts in loops["epoch_progress"].values():
                counts.update(dict.fromkeys(counts, counts["processed"]))
            return
        steps = position["sample"] // position["global_batch_size"]
        moved = steps * trainer.accumulate_grad_batches - progress["current"]["ready"]
        for counts in (progress["current"], progress["total"]):
            for stage in counts:
                counts[stage] += moved

    def state_dict(self) -> dict[str, float]:
        return {"best_top1": self.best_top1}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best_top1 = state_dict["best_top1"]

    def save(self, trainer: lightning.Trainer) -> Path:
        """Write a checkpoint of this step, and remove those beyond `keep`. Every rank must call it."""
        path = self.directory / f"step-{trainer.global_step:08d}.ckpt"
        self.directory.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(path)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for old in checkpoints(self.directory)[: -self.keep]:
                old.unlink(missing_ok=True)
        return path


def ends_epoch(trainer: lightning.Trainer) -> bool:
    """Whether the batch just trained on is the last of its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def checkpoints(directory: Path) -> list[Path]:
    """A run's numbered checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*.ckpt") if _NAME.fullmatch(path.name))


def newest(directory: Path) -> Path | None:
    """The checkpoint to continue from, or None."""
    found = checkpoints(directory)
    return found[-1] if found else None
