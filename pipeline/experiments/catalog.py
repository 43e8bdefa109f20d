"""All experiments, in the order in which a reader meets them."""

from __future__ import annotations

from pipeline.experiments import explosion
from pipeline.experiments.experiment import Experiment, ExperimentError

EXPERIMENTS: tuple[Experiment, ...] = (explosion.EXPERIMENT,)


def experiment(name: str) -> Experiment:
    """Raises ExperimentError for one that is not there."""
    found = next((each for each in EXPERIMENTS if each.name == name), None)
    if found is None:
        names = ", ".join(each.name for each in EXPERIMENTS)
        raise ExperimentError(f"{name!r} is no experiment; choose from {names}, or all")
    return found
