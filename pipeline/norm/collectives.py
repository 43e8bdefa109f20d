"""Groups of ranks that share batch statistics, and the one exchange a layer makes forward and backward.

Small groups gather every rank's packet and sum it locally in rank order: two hops, and bits that
repeat. Large groups all-reduce one sum. Either way the packet is float64 and travels on a process
group of its own, so that it never queues behind gradient buckets.   Legend: R ranks, P packet size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.norm.moments import Moments, from_sums, merge_packets, pack, pack_sums

GroupSize = int | str  # a number of ranks, or "node"

# Up to here each rank receives R packets (of 8 KiB at most for BN-Inception); beyond, one log-depth sum.
GATHER_LIMIT = 32


@dataclass(frozen=True)
class StatisticsGroup:
    """The ranks whose images are normalized together; size 1 exchanges nothing."""

    size: int
    process_group: dist.ProcessGroup | None

    def merged(self, moments: Moments) -> Moments:
        """Moments over all ranks of the group, identical on each. One collective."""
        if self.size == 1:
            return moments
        if self.size <= GATHER_LIMIT:
            return merge_packets(self._gathered(pack(moments)))
        return from_sums(self._reduced(pack_sums(moments)))

    def summed(self, packet_P: Tensor) -> Tensor:
        """Sum of every rank's packet, identical on each. One collective."""
        if self.size == 1:
            return packet_P
        if self.size <= GATHER_LIMIT:
            return self._gathered(packet_P).sum(0)
        return self._reduced(packet_P)

    def _gathered(self, packet_P: Tensor) -> Tensor:
        packets = packet_P.new_empty(self.size * packet_P.numel())  # flat: gloo of torch 2.15 takes no second dimension
        dist.all_gather_into_tensor(packets, packet_P.contiguous(), group=self.process_group)
        return packets.view(self.size, -1)

    def _reduced(self, packet_P: Tensor) -> Tensor:
        packet_P = packet_P.clone()
        dist.all_reduce(packet_P, group=self.process_group)
        return packet_P


_ALONE = StatisticsGroup(size=1, process_group=None)
_groups: dict[tuple[dist.ProcessGroup, GroupSize], StatisticsGroup] = {}


def statistics_group(group_size: GroupSize) -> StatisticsGroup:
    """This rank's group among consecutive ranks: 0 = all, 1 = this one, "node", or a divisor of the world.

    The first call for a size is collective: every rank of the world must make it.
    Raises ValueError if the size does not divide the world.
    """
    if group_size == 1 or not dist.is_available() or not dist.is_initialized():
        return _ALONE
    assert dist.group.WORLD is not None
    key = (dist.group.WORLD, group_size)
    if key not in _groups:
        _groups[key] = _create(group_size)
    return _groups[key]


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
    mine: dist.ProcessGroup | None = None
    for first in range(0, world, size):  # every rank takes part in creating every group
        ranks = list(range(first, first + size))
        created = dist.new_group(ranks)
        if rank in ranks and isinstance(created, dist.ProcessGroup):
            mine = created
    return StatisticsGroup(size=size, process_group=mine)


def average_over_world(values: Tensor) -> Tensor:
    """Mean of a tensor over every rank of the world; itself without a process group."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.to(torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(values.dtype)
