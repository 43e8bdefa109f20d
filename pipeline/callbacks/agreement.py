"""What all ranks must decide together, between two steps, without waiting for one another.

A few numbers are summed over all ranks in one small reduction, started after a step and read after the
next, when it has long arrived. It has a process group of its own on the CPU: nothing waits for a GPU.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 0.5  # between two reductions: the ranks count it in steps, the same number on each


class Agreement:
    """Sums of numbers over ranks. Every rank must call the same methods at the same steps."""

    def __init__(self) -> None:
        self.every = 1  # steps between two reductions
        self._group: dist.ProcessGroup | None = None
        self._work: dist.Work | None = None
        self._sums = torch.zeros(0)
        self._next, self._started_at, self._started_step = 0, time.perf_counter(), 0

    def begin(self, step: int, timeout: timedelta) -> None:
        """Before the first step. A collective."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._next = self._started_step = step
        self._started_at = time.perf_counter()

    def ask(self, step: int, values: list[float]) -> list[float] | None:
        """The sums of an earlier call's values, where they are due; of these at once for a single rank."""
        if self._group is None:
            return values
        sums = self._arrived()
        if step >= self._next:
            now = time.perf_counter()
            seconds = (now - self._started_at) / max(step - self._started_step, 1)
            self._started_at, self._started_step = now, step
            self._start(values, seconds)
            self._next = step + self.every
        return sums

    def settle(self, values: list[float]) -> list[float]:
        """The sums of these values, waited for."""
        if self._group is None:
            return values
        self._arrived()
        self._start(values, 0.0)
        sums = self._arrived()
        assert sums is not None
        return sums

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain value, in the order of ranks; waited for."""
        if self._group is None:
            return [value]
        self._arrived()
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _start(self, values: list[float], step_seconds: float) -> None:
        self._sums = torch.tensor([*values, step_seconds], dtype=torch.float64)
        self._work = dist.all_reduce(self._sums, group=self._group, async_op=True)

    def _arrived(self) -> list[float] | None:
        if self._work is None:
            return None
        self._work.wait()
        self._work = None
        *sums, seconds = _plain(self._sums)
        mean_seconds = seconds / dist.get_world_size(self._group)
        if mean_seconds > 0:
            self.every = min(max(round(SECONDS / mean_seconds), 1), 200)
        return sums


def _plain(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.tolist()
    return values
