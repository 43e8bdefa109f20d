"""The learning rate as a function of the step.

The rate is stated for a reference batch (the paper's 32 images) and grows in proportion to the global
batch. It warms up linearly from the stated rate and decays exponentially at every step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """rate: for rate_batch_size images. decay_factor: what remains of it after decay_epochs. images: in an epoch."""

    rate: float
    rate_batch_size: int
    global_batch_size: int
    images: int
    decay_factor: float
    decay_epochs: float
    warmup_epochs: float = 0.0

    @property
    def scaled_rate(self) -> float:
        """The rate of the global batch, before warm-up and decay."""
        return self.rate * self.global_batch_size / self.rate_batch_size

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        epochs = step * self.global_batch_size / self.images
        rate = self.scaled_rate
        if epochs < self.warmup_epochs:
            first = min(self.rate, rate)
            rate = first + (rate - first) * epochs / self.warmup_epochs
        return float(rate * self.decay_factor ** (epochs / self.decay_epochs))
