"""Groups of ranks that share batch statistics, and the one exchange a level of layers makes forward and backward.

Small groups exchange packets directly, every pair at once, and sum them locally in rank order: two hops
whatever the size, and bits that repeat. Large groups all-reduce one sum. Either way the packet is float64
and travels on a process group of its own, so that it never queues behind gradient buckets. Over gloo with
5 ms one way, 4 ranks and 8 KB: direct 14 ms, its all-gather 34, its all-reduce 63 (benchmarks.md).
Legend: R ranks, P packet size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.norm.moments import packet_of, sums_of
from pipeline.norm.waiting import STATISTICS

GroupSize = int | str  # a number of ranks, or "node"

# Ranks up to which each receives R packets (of 16 KB at most for BN-Inception); beyond, one log-depth sum.
GATHER_LIMIT = 32
# NCCL's all-gather is a ring: by the constants of its own tuner, 8 GPUs a node, 23 us for 16 ranks and 43 for 32; its
# all-reduce takes 25 and 35.
GATHER_LIMIT_CUDA = 16


@dataclass(frozen=True)
class StatisticsGroup:
    """The ranks whose images are normalized together; size 1 exchanges nothing.

    process_group: absent in a trace, which knows the group by its name. first: its lowest rank.
    """

    size: int
    process_group: dist.ProcessGroup | None = None
    first: int = 0
    name: str = ""

    def begin_merge(self, packets: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to exchange each layer's packet; what is returned waits. One exchange.

        Of each layer the packets of all ranks, in their order (R, P), to be merged; in a large group one
        row, that of the union (1, P).
        """
        if self.size == 1:
            return lambda: [packet_P[None] for packet_P in packets]
        sizes = [packet_P.numel() for packet_P in packets]
        if self._gathers(packets[0]):
            rows = self._begin_gather(torch.cat(list(packets)))
            return lambda: list(torch.split(rows(), sizes, dim=1))
        sums = self._begin_reduce(torch.cat([sums_of(packet_P) for packet_P in packets]))
        return lambda: [packet_of(each)[None] for each in torch.split(sums(), sizes)]

    def begin_sum(self, packet_P: Tensor) -> Callable[[], Tensor]:
        """Start to exchange what is to be added up; what is returned waits. One exchange.

        Every rank's packet, in the order of ranks (R, P); in a large group their sum (1, P).
        """
        if self.size == 1:
            return lambda: packet_P[None]
        if self._gathers(packet_P):
            return self._begin_gather(packet_P)
        total = self._begin_reduce(packet_P)
        return lambda: total()[None]

    def _gathers(self, packet_P: Tensor) -> bool:
        return self.size <= (min(GATHER_LIMIT, GATHER_LIMIT_CUDA) if packet_P.is_cuda else GATHER_LIMIT)

    def _begin_gather(self, packet_P: Tensor) -> Callable[[], Tensor]:
        """Every rank's packet, in the order of ranks (R, P)."""
        if torch.compiler.is_compiling():
            begun = torch.ops._c10d_functional.all_gather_into_tensor(packet_P, self.size, self.name)
            return lambda: torch.ops._c10d_functional.wait_tensor(begun).view(self.size, -1)
        rows_RP = packet_P.new_empty(self.size, packet_P.numel())
        if packet_P.is_cuda:
            work = dist.all_gather_into_tensor(
                rows_RP.view(-1), packet_P.contiguous(), group=self.process_group, async_op=True
            )
            return partial(_arrived, rows_RP, [work], packet_P)
        mine = dist.get_rank() - self.first
        rows_RP[mine] = packet_P
        works: list[dist.Work | None] = []
        for other in range(self.size):
            if other != mine:
                rank = self.first + other
                works.append(dist.irecv(rows_RP[other], src=rank, group=self.process_group))
                works.append(dist.isend(rows_RP[mine], dst=rank, group=self.process_group))
        return partial(_arrived, rows_RP, works, packet_P)

    def _begin_reduce(self, packet_P: Tensor) -> Callable[[], Tensor]:
        if torch.compiler.is_compiling():
            begun = torch.ops._c10d_functional.all_reduce(packet_P, "sum", self.name)
            return lambda: torch.ops._c10d_functional.wait_tensor(begun)
        sum_P = packet_P.clone()
        return partial(_arrived, sum_P, [dist.all_reduce(sum_P, group=self.process_group, async_op=True)], packet_P)


def _arrived(result: Tensor, works: Sequence[dist.Work | None], sent: Tensor) -> Tensor:
    """result, when all works are done. sent: kept until then."""
    mark = STATISTICS.begin(result.device)
    for work in works:
        if work is not None:
            work.wait()
    STATISTICS.end(mark)
    return result


_ALONE = StatisticsGroup(size=1)
_groups: dict[tuple[dist.ProcessGroup, GroupSize], StatisticsGroup] = {}


def statistics_group(group_size: GroupSize) -> StatisticsGroup:
    """This rank's group among consecutive ranks: 0 = all, 1 = this one, "node", or a divisor of the world.

    The first call for a size is collective: every rank of the world must make it.
    Raises ValueError if the size does not divide the world.
    """
    if torch.compiler.is_compiling():
        size, name = _traced(group_size)
        return StatisticsGroup(size, name=name)
    return _group(group_size)


def _group(group_size: GroupSize) -> StatisticsGroup:
    if group_size == 1 or not dist.is_available() or not dist.is_initialized():
        return _ALONE
    assert dist.group.WORLD is not None
    key = (dist.group.WORLD, group_size)
    if key not in _groups:
        _groups[key] = _create(group_size)
    return _groups[key]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _traced(group_size: GroupSize) -> tuple[int, str]:
    """Size and name of the group. It runs while a trace is made, outside of it."""
    group = _group(group_size)
    return group.size, group.name


def _create(group_size: GroupSize) -> StatisticsGroup:
    world, rank = dist.get_world_size(), dist.get_rank()
    size = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if group_size == "node" else int(group_size) or world
    if size < 1 or world % size:
        divisors = [g for g in range(1, world + 1) if world % g == 0]
        raise ValueError(
            f"norm.group_size = {size} does not divide the world of {world} ranks; "
            f"choose one of {divisors}, or 0 for all"
        )
    if size == 1:
        return _ALONE
    mine = _ALONE
    for first in range(0, world, size):  # every rank takes part in creating every group
        ranks = list(range(first, first + size))
        created = dist.new_group(ranks, timeout=_timeout_of_world(), pg_options=_urgent())
        if rank in ranks and isinstance(created, dist.ProcessGroup):
            mine = StatisticsGroup(size, created, first, created.group_name)
    return mine


def _timeout_of_world() -> timedelta | None:
    """How long the ranks' own group waits; None for torch's default. A new group would not ask it."""
    assert dist.group.WORLD is not None
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    options = getattr(dist.group.WORLD._get_backend(device), "options", None)
    timeout: timedelta | None = getattr(options, "_timeout", None)
    return timeout


def _urgent() -> Any:
    """NCCL on a stream before others: statistics are waited for, gradients are not."""
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    return options


def sum_over_world(values: Tensor) -> Tensor:
    """Sum of a tensor over every rank of the world, in float64; its own values without a process group."""
    total = values.to(torch.float64, copy=True)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def average_over_world(values: Tensor) -> Tensor:
    """Mean of a tensor over every rank of the world; itself without a process group."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    return (sum_over_world(values) / dist.get_world_size()).to(values.dtype)
