"""How fast numbers travel between the ranks, and whose link is slow.

exchange   of a level's statistics, as training makes it: a packet of 8 KB (BN-Inception has 2 to 16) from every rank to
           every other
sum        of a bucket of gradients, 25 MB as DDP cuts them
pairs      a sum waits for its slowest member and does not tell which. So units (nodes, or ranks where there is one
           node) meet in pairs, all pairs at once, in rounds in which each meets another one: a slow link is slow with
           every partner, a sound one only with the slow one. A unit's best time is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.distributed as dist

from pipeline.norm.collectives import StatisticsGroup

STATISTICS_BYTES, GRADIENT_BYTES = 8_192, 25_000_000
PAIR_BYTES = 1_000_000
ROUNDS = 6  # of pairs at most: so many partners tell
_EXCHANGES, _SECONDS = 20, 2.0  # of a size, and what all of its repeats may take
PHASES = ("connection", "statistics", "gradients", "pairs", "end")


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one size: median and longest of so many, in seconds."""

    bytes: int
    median: float
    worst: float
    repeats: int


@dataclass(slots=True)
class Links:
    """What one rank has measured. pairs: by the other rank, seconds of a small exchange and of PAIR_BYTES both ways.

    phase: that it has come to; "end" once it has measured everything. error: what ended it before.
    """

    phase: str = PHASES[0]
    statistics: Timing | None = None
    gradients: Timing | None = None
    pairs: dict[int, tuple[float, float]] = field(default_factory=dict)
    error: str = ""


def measure(links: Links, units: Sequence[Sequence[int]], rank: int, device: torch.device) -> None:
    """Fill in `links` by collectives of the default group. units: the ranks of each node, or each rank alone."""
    links.phase = PHASES[1]
    assert dist.group.WORLD is not None
    group = StatisticsGroup(dist.get_world_size(), dist.group.WORLD)
    packet = torch.ones(STATISTICS_BYTES // 8, dtype=torch.float64, device=device)
    links.statistics = _timed(STATISTICS_BYTES, lambda: _exchanged(group, packet), device)
    links.phase = PHASES[2]
    bucket = torch.zeros(GRADIENT_BYTES // 4, device=device)
    links.gradients = _timed(GRADIENT_BYTES, lambda: dist.all_reduce(bucket), device)
    links.phase = PHASES[3]
    for other in partners(units, rank):
        small, large = (_exchange(other, size, device) for size in (STATISTICS_BYTES, PAIR_BYTES))
        _shortest(small, device, 3)  # both have come
        links.pairs[other] = (_shortest(small, device, 8), _shortest(large, device, 3))
    dist.barrier()
    links.phase = PHASES[4]


def partners(units: Sequence[Sequence[int]], rank: int) -> list[int]:
    """Whom a rank meets, a round after the other: round-robin of the units, cut short after so many rounds.

    Each rank of a unit meets the one of the same place in the other; it meets nobody where that has none.
    """
    own = next(number for number, ranks in enumerate(units) if rank in ranks)
    place = list(units[own]).index(rank)
    circle = len(units) + len(units) % 2  # one that sits out where they are odd
    met = []
    for turn in range(min(ROUNDS, circle - 1)):
        # The last stays, the others go round: a and b meet where a + b = turn (modulo circle - 1).
        if own == circle - 1:
            other = next(a for a in range(circle - 1) if 2 * a % (circle - 1) == turn)
        else:
            other = (turn - own) % (circle - 1)
            other = circle - 1 if other == own else other
        if other < len(units) and place < len(units[other]):
            met.append(units[other][place])
    return met


def slow(times: dict[int, dict[int, float]], units: Sequence[Sequence[int]], factor: float = 3.0,
         least: float = 0.0) -> list[int]:  # fmt: skip
    """Units whose best time with any partner is `factor` times that of the middle unit, and `least` seconds longer.

    times: of each rank with each of its partners. With two units there is one pair, and nobody can tell whose it is.
    """
    if len(units) < 3:
        return []
    bests = [min((min(times[rank].values()) for rank in ranks if times.get(rank)), default=None) for ranks in units]
    known = [best for best in bests if best is not None]
    if len(known) < 3:
        return []
    middle = median(known)
    return [number for number, best in enumerate(bests)
            if best is not None and best > factor * middle and best > middle + least]  # fmt: skip


def _exchanged(group: StatisticsGroup, packet: torch.Tensor) -> None:
    group.begin_sum(packet)()


def _exchange(other: int, size: int, device: torch.device) -> Callable[[], None]:
    out, back = (torch.zeros(size // 4, device=device) for _ in range(2))

    def exchange() -> None:
        # Both in one batch: NCCL then takes the group's own connections and makes none for the pair.
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, back, other)]):
            work.wait()

    return exchange


def _timed(size: int, action: Callable[[], object], device: torch.device) -> Timing:
    """Median and worst of as many as the time allows; all ranks repeat equally often."""
    for _ in range(2):  # at the first connections are made, and memory is asked for
        first = torch.tensor([_seconds(action, device)], device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MAX)
        if float(first) > _SECONDS:
            return Timing(size, float(first), float(first), 1)
    repeats = min(_EXCHANGES, max(3, int(_SECONDS / float(first))))
    taken = []
    for _ in range(repeats):
        dist.barrier()
        taken.append(_seconds(action, device))
    return Timing(size, median(taken), max(taken), repeats)


def _shortest(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    return min(_seconds(action, device) for _ in range(repeats))


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    _settle(device)
    began = time.perf_counter()
    action()
    _settle(device)
    return time.perf_counter() - began


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bus_bandwidth(timing: Timing, world: int) -> float:
    """Bytes a second that each rank's link carries in a sum: 2 (n-1)/n of the bytes over its time."""
    return 2 * (world - 1) / world * timing.bytes / timing.median
