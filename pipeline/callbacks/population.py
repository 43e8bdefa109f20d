"""Population statistics before each validation (Algorithm 2): it judges the weights, not a running average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning

from pipeline.data.batch import Batch
from pipeline.data.loader import TrainLoader
from pipeline.norm.population import BATCHES, estimate, merge_groups
from pipeline.norm.statistics import Statistics, kept
from pipeline.training.classifier import Classifier


class Population(lightning.Callback):
    """images: training images in the estimate; 0 validates with running averages, merged over groups of ranks.

    form: of the estimate, batches or aggregate. on_batch: called before each batch of it.
    running: the running averages that the estimate overwrites. They go into checkpoints: those that are written after a
    validation hold the population's in their weights.
    """

    def __init__(
        self, loader: TrainLoader, images: int, *, form: str = BATCHES, on_batch: Callable[[], object] = lambda: None
    ):
        self.loader, self.images, self.form, self.on_batch = loader, images, form, on_batch
        self.running: Statistics = {}
        self._kept_at = -1

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if not self.images:
            merge_groups(pl_module.model)
            return
        if trainer.global_step != self._kept_at:  # else a validation that was cut short begins again
            self.running, self._kept_at = kept(pl_module.model), trainer.global_step
        self._estimate(trainer, pl_module)
        if pl_module.averaging is not None:  # its statistics are its own: averages of others' would be of no network
            with pl_module.averaging.applied(pl_module.model):
                self._estimate(trainer, pl_module)

    def _estimate(self, trainer: lightning.Trainer, pl_module: Classifier) -> None:
        batches = (self._moved(trainer, batch) for batch in self.loader.population_batches(self.images))
        with trainer.precision_plugin.forward_context():
            estimate(pl_module.model, batches, forward=pl_module, form=self.form)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._kept_at, "running": dict(self.running)} if self.running else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept_at, self.running = state_dict["step"], state_dict["running"]

    def _moved(self, trainer: lightning.Trainer, batch: Batch) -> Batch:
        self.on_batch()
        moved: Batch = trainer.strategy.batch_to_device(batch)
        return moved


def running_averages(checkpoint: Mapping[str, Any]) -> Statistics | None:
    """Those of a checkpoint that was written after a validation; None where they are still among its weights."""
    state = checkpoint.get("callbacks", {}).get(Population.__name__, {})
    found: Statistics | None = state["running"] if state.get("step") == checkpoint["global_step"] else None
    return found
