"""Scores of a validation with other statistics beside its own: what running averages would have made of it, say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch

from pipeline.evaluation.metrics import Sums
from pipeline.norm.statistics import Statistics, held
from pipeline.training.classifier import Classifier


class Beside(lightning.Callback):
    """Each validation batch once more, with the statistics that `of` returns; classifier.scores_beside gets the scores.

    None of it is read twice, and the validation itself is the same. of: asked when a validation has begun.
    """

    def __init__(self, of: Callable[[], Statistics]):
        self.of = of
        self._statistics: Statistics = {}
        self._sums: Sums | None = None

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._statistics, self._sums = self.of(), Sums(pl_module.device)

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        assert isinstance(pl_module, Classifier)
        assert self._sums is not None
        with held(pl_module.model, self._statistics), trainer.precision_plugin.forward_context():
            pl_module.score(batch, self._sums)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        assert self._sums is not None
        pl_module.scores_beside = self._sums.merged()
