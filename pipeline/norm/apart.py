"""Population statistics from batches that each one rank holds whole: the same bits on any number of ranks.

`population.estimate` shares each batch out, as training does, and its sums then have the order of the ranks. Here a
rank takes whole batches, each `world`-th, and normalizes them by itself; what it saw is put together in the order of
the batches. It exchanges once, at the end, and needs room for a batch.
Legend: B batches, P numbers of a packet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.norm.collectives import sum_over_world
from pipeline.norm.moments import Moments, pack
from pipeline.norm.population import BATCHES, Batch, Norm, moments_seen, on_batch_statistics, tracked_norms
from pipeline.norm.sync_batch_norm import SyncBatchNorm


@torch.no_grad()
def estimate_apart(
    module: nn.Module,
    batches: Iterable[tuple[int, Batch]],
    count: int,
    forward: Callable[[Batch], object],
    *,
    form: str = BATCHES,
) -> None:
    """Set the running statistics of every norm in module to the population's, as `population.estimate` defines them.

    batches: this rank's, each with its number below count, equal in size; every number on one rank. A collective.
    Weights, training flags, momenta and groups are left as found. Without a batch the statistics stay as they were, and
    so do those of a norm that no batch passes, or that is frozen.
    """
    norms = tracked_norms(module)
    if not norms or not count:
        return
    before = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    kept = statistics_of(module)
    packets_BP = kept.new_zeros(count, len(kept) + len(norms))
    with on_batch_statistics(module, norms), _alone(norms):
        for number, batch in batches:
            with moments_seen(norms) as seen:
                forward(batch)
            packets_BP[number] = torch.cat([pack(seen[n]) if n in seen else _nothing(n) for n in norms])
    packets_BP = sum_over_world(packets_BP)  # of numbers and zeros: exact in any order
    sizes = [2 * len(_mean(norm)) + 1 for norm in norms]
    found = [
        _population(rows, form) if rows[:, 0].any() else (_mean(norm).cpu().double(), _variance(norm).cpu().double())
        for norm, rows in zip(norms, torch.split(packets_BP.cpu(), sizes, dim=1), strict=True)
    ]
    set_statistics(module, torch.cat([mean for mean, _ in found] + [variance for _, variance in found]))
    for norm, tracked in zip(norms, before, strict=True):
        if norm.num_batches_tracked is not None and tracked is not None:
            norm.num_batches_tracked.copy_(tracked)


def statistics_of(module: nn.Module) -> Tensor:
    """The running means of all norms of the module that are not frozen, then the running variances, in float64."""
    norms = tracked_norms(module)
    if not norms:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat([_mean(norm) for norm in norms] + [_variance(norm) for norm in norms]).double()


@torch.no_grad()
def set_statistics(module: nn.Module, values: Tensor) -> None:
    """Give the norms what `statistics_of` gave. Raises ValueError for those of another network."""
    norms = tracked_norms(module)
    buffers = [*map(_mean, norms), *map(_variance, norms)]
    sizes = [len(buffer) for buffer in buffers]
    if sum(sizes) != len(values):
        raise ValueError(f"{len(values)} running statistics do not fit a network that has {sum(sizes)}")
    for buffer, value in zip(buffers, torch.split(values, sizes), strict=True):
        buffer.copy_(value)


def _population(packets_BP: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """A norm's mean and variance from the moments of its batches, added up in their order."""
    channels = (packets_BP.shape[1] - 1) // 2
    batches = [Moments(*torch.split(row, [1, channels, channels])) for row in packets_BP]
    if form == BATCHES:
        mean_C = _sum([each.mean_C for each in batches]) / len(batches)
        return mean_C, _sum([each.unbiased_variance_C() for each in batches]) / len(batches)
    count = _sum([each.count for each in batches]).clamp(min=1)
    mean_C = _sum([each.count * each.mean_C for each in batches]) / count
    return mean_C, _sum([each.m2_C + each.count * (each.mean_C - mean_C).square() for each in batches]) / count


def _sum(values: list[Tensor]) -> Tensor:
    """One after the other: torch's own sum has an order that depends on the processor."""
    total = torch.zeros_like(values[0])
    for value in values:
        total += value
    return total


def _nothing(norm: Norm) -> Tensor:
    """The packet of a norm that the batch did not pass."""
    mean_C = _mean(norm)
    return pack(Moments.empty(len(mean_C), mean_C.device))


def _mean(norm: Norm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _variance(norm: Norm) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var


@contextmanager
def _alone(norms: list[Norm]) -> Iterator[None]:
    """Each rank normalizes by itself, and running statistics stand still."""
    groups = {norm: norm.group_size for norm in norms if isinstance(norm, SyncBatchNorm)}
    try:
        for norm in norms:
            norm.momentum = 0.0
        for group in groups:
            group.group_size = 1
        yield
    finally:
        for norm, size in groups.items():
            norm.group_size = size
