"""Images a second of the same network in several forms, in turn, so that a drifting machine drifts for all.

The statement is of this machine, at that moment, with so many threads.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Form = Callable[[Tensor], Tensor]
ROUNDS = 10
BATCHES = (1, 8)
SECONDS = 0.2  # the least that a form runs for in a round


class Speed(NamedTuple):
    """Images a second: the median of `rounds`, the slowest and the fastest."""

    form: str
    batch: int
    median: float
    low: float
    high: float
    rounds: int


@torch.no_grad()
def measured(
    forms: Mapping[str, Form],
    images: Tensor,
    *,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Speed]:
    """A row for each form and batch size."""
    rows: list[Speed] = []
    total = len(batches) * (rounds + 1)
    for place, batch in enumerate(batches):
        given = batch_of(images, batch)
        for form in forms.values():  # compiles, chooses its kernels, fills its caches
            form(given)
            form(given)
        progress(place * (rounds + 1) + 1, total)
        rates: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(rounds):
            for name, form in forms.items():
                rates[name].append(_rate(form, given))
            progress(place * (rounds + 1) + number + 2, total)
        rows += [Speed(n, batch, statistics.median(r), min(r), max(r), rounds) for n, r in rates.items()]
    return rows


def batch_of(images: Tensor, size: int) -> Tensor:
    """The first ones, repeated to fill it."""
    return images.repeat(-(-size // len(images)), 1, 1, 1)[:size].contiguous()


def machine() -> str:
    """Threads, cores and load: what these numbers depend on."""
    return f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def _rate(form: Form, images: Tensor) -> float:
    began, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SECONDS or not calls:
        form(images)
        calls += 1
    return calls * len(images) / passed
