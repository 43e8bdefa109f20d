"""norms.csv: how the norms of a network are doing, layer by layer, at single steps of the run (norm/health.py)."""

from __future__ import annotations

from dataclasses import astuple, fields
from pathlib import Path

from torch import nn

from pipeline.callbacks.look import Look
from pipeline.callbacks.step_table import StepTable
from pipeline.norm.health import Health, Watch

COLUMNS = ("step", "layer", *(f.name for f in fields(Health)))


class Norms(Look[Watch]):
    """A line for each norm, in four digits. For the leading rank: the others see the same."""

    def __init__(self, path: Path, *, every_steps: int):
        super().__init__(StepTable(path, COLUMNS), every_steps)

    def watch(self, model: nn.Module) -> Watch:
        return Watch(model)

    def write(self, step: int, watch: Watch) -> None:
        self.table.append((step, layer, *map(float, astuple(health))) for layer, health in watch.read().items())
