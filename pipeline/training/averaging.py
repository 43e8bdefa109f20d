"""The average of the weights over the last steps, which is validated and kept beside the weights that are trained.

After every so many steps: average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at the n-th
time, so that a short run is not an average of its beginning (as TensorFlow's ExponentialMovingAverage). Nothing is
trained on the average. Its norms have statistics of their own, estimated on it (Algorithm 2): averaged statistics would
be those of no network. torch's AveragedModel is not used: it copies the network, process groups and hooks included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Averaging:
    """decay: of the average, at each update. every_steps: optimizer steps between updates.

    start_step: until then the average is the weights themselves. state: the average by the names of the model's
    parameters, and its statistics by those of the buffers; empty before `begin`.
    """

    def __init__(self, decay: float, every_steps: int = 1, start_step: int = 0):
        self.decay, self.every_steps, self.start_step = decay, every_steps, start_step
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Start from the model's weights, or go on from what was loaded, on its devices."""
        for name, own in _tensors(model):
            self.state[name] = self.state[name].to(own.device) if name in self.state else own.detach().clone()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        if step % self.every_steps:
            return
        averages = [self.state[name] for name, _ in model.named_parameters()]
        weights = [weight.detach() for weight in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay_at(step))

    def decay_at(self, step: int) -> float:
        """What the average keeps of itself in the update after a step; 0 before it starts."""
        if step <= self.start_step:
            return 0.0
        count = (step - self.start_step) // self.every_steps
        return min(self.decay, (1 + count) / (10 + count))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights, and statistics of its own, while this lasts. Moves no data."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's average."""
        self.state = dict(state)

    def _exchange(self, model: nn.Module) -> None:
        for name, own in _tensors(model):
            own.data, self.state[name] = self.state[name], own.data


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
