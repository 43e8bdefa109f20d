"""All experiments, in the order in which a reader meets them."""

from __future__ import annotations

from pipeline.experiments import explosion
from pipeline.experiments.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (explosion.EXPERIMENT,)
