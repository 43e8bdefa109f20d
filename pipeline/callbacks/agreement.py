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

SECONDS = 0.5  # between two reductions: the ranks count it in calls, the same number on each


class Agreement:
    """Sums of numbers over ranks. Every rank must call the same methods in the same order."""

    def __init__(self) -> None:
        self.every = 1  # calls between two reductions
        self._group: dist.ProcessGroup | None = None
        self._work: dist.Work | None = None
        self._sums = torch.zeros(0)
        self._calls, self._started_at = 0, time.perf_counter()

    def begin(self, timeout: timedelta) -> None:
        """Before the first question. A collective."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._started_at = time.perf_counter()

    def ask(self, values: list[float]) -> list[float] | None:
        """The sums of an earlier call's values, where they are due; of these at once for a single rank.

        To be called after every step of whatever is going on, training or validation: calls are what is counted.
        """
        if self._group is None:
            return values
        sums = self._arrived()
        self._calls += 1
        if self._calls >= self.every:
            now = time.perf_counter()
            seconds = (now - self._started_at) / self._calls
            self._started_at, self._calls = now, 0
            self._start(values, seconds)
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
