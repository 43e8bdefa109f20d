"""gradients.csv: how the gradients of each layer are distributed, at single steps of the run.

Bins are the same for all layers, steps and runs (histogram.py), so that any two can be laid over each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from pipeline.callbacks.histogram import EDGES_E, histogram, weights
from pipeline.callbacks.step_table import StepTable
from pipeline.norm.preactivations import chosen
from pipeline.training.classifier import Classifier

COLUMNS = ("step", "layer", "values", "deviation", "kurtosis", "tail", "counts")


class Gradients(lightning.Callback):
    """A line for each layer at every `every_steps`-th optimizer step: its weight's gradient of the whole global batch.

    It is read when it has been added up over ranks and micro-batches, before the step; nothing that is trained depends
    on it. For the leading rank alone: the others have the same. patterns: of layers' names; none = every weight of more
    than one dimension. tell: gets the same by names in W&B, a histogram as W&B's client writes one.
    """

    def __init__(
        self, path: Path, *, every_steps: int, patterns: Sequence[str] = (),
        tell: Callable[[dict[str, Any]], None] = lambda figures: None,
    ):  # fmt: skip
        self.table, self.every_steps, self.patterns, self.tell = StepTable(path, COLUMNS), every_steps, patterns, tell

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.table.begin(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, Classifier)
        step = trainer.global_step + 1
        if step % self.every_steps:
            return
        found = {name: histogram(gradient) for name, gradient in self._gradients(pl_module).items()}
        self.table.append(
            (step, name, each.values, each.deviation, each.kurtosis, each.tail, " ".join(map(str, each.counts_B)))
            for name, each in found.items()
        )
        self.tell({
            f"gradients/{name}": {"_type": "histogram", "values": each.counts_B.tolist(), "bins": EDGES_E.tolist()}
            for name, each in found.items()
        })  # fmt: skip
        self.tell({
            f"gradients/{name}/{figure}": value
            for name, each in found.items()
            for figure in ("deviation", "kurtosis", "tail")
            if np.isfinite(value := getattr(each, figure))
        })  # fmt: skip

    def _gradients(self, classifier: Classifier) -> dict[str, Tensor]:
        """By layer, of a step that has any."""
        named = {name: weight.grad for name, weight in weights(classifier.model).items() if weight.grad is not None}
        names = chosen(list(named), self.patterns) if self.patterns else list(named)
        return {name: named[name] for name in names}
