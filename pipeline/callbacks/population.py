"""Population statistics before each validation (Algorithm 2): it judges the weights, not a running average."""

from __future__ import annotations

from collections.abc import Callable

import lightning

from pipeline.data.batch import Batch
from pipeline.data.loader import TrainLoader
from pipeline.norm.population import BATCHES, estimate, merge_groups
from pipeline.training.classifier import Classifier


class Population(lightning.Callback):
    """images: training images in the estimate; 0 validates with running averages, merged over groups of ranks.

    form: of the estimate, batches or aggregate. on_batch: called before each batch of it.
    """

    def __init__(
        self, loader: TrainLoader, images: int, *, form: str = BATCHES, on_batch: Callable[[], object] = lambda: None
    ):
        self.loader, self.images, self.form, self.on_batch = loader, images, form, on_batch

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if not self.images:
            merge_groups(pl_module.model)
            return
        batches = (self._moved(trainer, batch) for batch in self.loader.population_batches(self.images))
        with trainer.precision_plugin.forward_context():
            estimate(pl_module.model, batches, forward=pl_module, form=self.form)

    def _moved(self, trainer: lightning.Trainer, batch: Batch) -> Batch:
        self.on_batch()
        moved: Batch = trainer.strategy.batch_to_device(batch)
        return moved
