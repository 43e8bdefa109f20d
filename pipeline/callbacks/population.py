"""Population statistics before each validation (Algorithm 2): it judges the weights, not a running average."""

from __future__ import annotations

import lightning

from pipeline.data.loader import TrainLoader
from pipeline.norm.population import estimate, merge_groups
from pipeline.training.classifier import Classifier


class Population(lightning.Callback):
    """images: training images in the estimate; 0 validates with running averages, merged over groups of ranks."""

    def __init__(self, loader: TrainLoader, images: int):
        self.loader, self.images = loader, images

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if not self.images:
            merge_groups(pl_module.model)
            return
        batches = (trainer.strategy.batch_to_device(batch) for batch in self.loader.population_batches(self.images))
        with trainer.precision_plugin.forward_context():
            estimate(pl_module.model, batches, forward=pl_module)
