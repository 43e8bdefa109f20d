"""percentiles.csv: where the inputs of nonlinearities lie, at single steps of the run (norm/preactivations.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.callbacks.look import Look
from pipeline.callbacks.step_table import StepTable
from pipeline.norm.preactivations import PERCENTS, Watch, chosen, layers

ALL = "all"  # in place of a unit's number
COLUMNS = ("step", "layer", "unit", *(f"p{percent}" for percent in PERCENTS))
Figures = dict[str, Any]


class Activations(Look[Watch]):
    """Two lines for each watched layer: its middle unit, and all units, of the leading rank's own share of the batch.

    Nothing that is trained depends on it. patterns: of layers' names; none = the last one before the classifier.
    tell: gets the same figures by their names in W&B.
    """

    def __init__(
        self, path: Path, *, every_steps: int, patterns: Sequence[str] = (),
        tell: Callable[[Figures], None] = lambda figures: None,
    ):  # fmt: skip
        super().__init__(StepTable(path, COLUMNS), every_steps)
        self.patterns, self.tell = patterns, tell

    def watch(self, model: nn.Module) -> Watch:
        names = layers(model)
        return Watch(model, chosen(names, self.patterns) if self.patterns else names[-1:])

    def write(self, step: int, watch: Watch) -> None:
        found = watch.read()
        self.table.append(
            (step, layer, unit, *values)
            for layer, each in found.items()
            for unit, values in ((str(each.unit), each.of_unit), (ALL, each.of_all))
        )
        self.tell({
            f"percentiles/{layer}/{unit}/p{percent}": value
            for layer, each in found.items()
            for unit, values in (("unit", each.of_unit), (ALL, each.of_all))
            for percent, value in zip(PERCENTS, values, strict=True)
        })  # fmt: skip
