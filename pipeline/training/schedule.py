"""The learning rate as a function of the step.

The rate is stated for a reference batch (the paper's 32 images) and grows in proportion to the global
batch. It warms up linearly, and falls: exponentially at every step from the first one on, or behind the
warm-up along a half cosine (Loshchilov & Hutter 2017) or a power of what is left (MLPerf's LARS: 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FORMS = ("exponential", "cosine", "polynomial")


@dataclass(frozen=True, slots=True)
class Schedule:
    """rate: for rate_batch_size images. images: in an epoch.

    decay_factor: what remains of the rate after decay_epochs, of the exponential form. The others end after `epochs`,
    warm-up included, at final_factor of the rate, and stay there. warmup_factor: what the warm-up begins with, of the
    global batch's rate; 0 = the unscaled rate.
    """

    rate: float
    rate_batch_size: int
    global_batch_size: int
    images: int
    decay_factor: float = 1.0
    decay_epochs: float = 1.0
    warmup_epochs: float = 0.0
    warmup_factor: float = 0.0
    form: str = "exponential"
    epochs: float = 0.0
    power: float = 2.0
    final_factor: float = 0.0

    @property
    def scaled_rate(self) -> float:
        """The rate of the global batch, before warm-up and decay."""
        return self.rate * self.global_batch_size / self.rate_batch_size

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        epochs = step * self.global_batch_size / self.images
        rate = self.scaled_rate
        if epochs < self.warmup_epochs:
            first = rate * self.warmup_factor if self.warmup_factor else min(self.rate, rate)
            rate = first + (rate - first) * epochs / self.warmup_epochs
        if self.form == "exponential":
            return float(rate * self.decay_factor ** (epochs / self.decay_epochs))
        return float(rate * self._remaining(epochs))

    def misfit(self, steps: int) -> str:
        """Where a run of so many steps ends elsewhere than its curve, and what that means; "" where both fit."""
        if self.form == "exponential":
            return ""
        epochs = steps * self.global_batch_size / self.images
        step = self.global_batch_size / self.images  # whole batches alone: an epoch may leave out nearly one
        if abs(epochs - self.epochs) <= max(step * self.epochs, step):
            return ""
        means = "stays high to its end" if epochs < self.epochs else f"is {self(steps):g} from there on"
        return (f"the {self.form} ends after {self.epochs:g} epochs and the run after {epochs:.3g}: its rate {means}; "
                "in a new run set schedule.epochs, and warmup_epochs with it")  # fmt: skip

    def _remaining(self, epochs: float) -> float:
        """What is left of the rate behind the warm-up, between 1 and final_factor."""
        left = min(max((self.epochs - epochs) / (self.epochs - self.warmup_epochs), 0.0), 1.0)
        shape = (1 - math.cos(math.pi * left)) / 2 if self.form == "cosine" else left**self.power
        return self.final_factor + (1 - self.final_factor) * shape
