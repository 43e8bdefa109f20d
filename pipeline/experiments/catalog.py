"""All experiments, in the order in which a reader meets them."""

from __future__ import annotations

from pipeline.experiments import ensemble, explosion, gradients, mnist, scale_invariance, small_batch, steps
from pipeline.experiments.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    mnist.EXPERIMENT, steps.EXPERIMENT, ensemble.EXPERIMENT, small_batch.EXPERIMENT, gradients.EXPERIMENT,
    explosion.EXPERIMENT, scale_invariance.EXPERIMENT,
)  # fmt: skip
