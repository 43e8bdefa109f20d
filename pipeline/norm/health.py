"""How the norms of a network are doing, read off the statistics that they exchange anyway.

Off, it costs nothing; on, a few operations on vectors of C numbers for each norm, no exchange and, until `read`, no
wait for the device.   Legend: C channels, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.norm.moments import merge_packets
from pipeline.norm.sync_batch_norm import SyncBatchNorm

SILENT = 4.0  # standard deviations below zero, from where on a ReLU lets one value in 30,000 through


@dataclass(frozen=True, slots=True)
class Health:
    """Of one norm at its last training batch; the same on every rank of a group.

    spread: standard deviation of the ranks' own means around the group's, in standard deviations of the channel,
    the root of the mean square over channels: 0 for equal shares, 1/sqrt(n) for n independent values a rank, and
    about 1 where ranks see different data. NaN where packets of several ranks do not meet: alone, and in groups
    that are large enough to add them up on their way.
    dead: the fraction of channels that say nothing: they have no variance or no gain, or lie so far below zero that
    a ReLU behind them is always 0.
    mean_drift: how far the running mean was from the batch's before it took that in, in standard deviations, root of
    the mean square. variance_drift: |log(running variance / the batch's)|, likewise, mean over channels that have a
    variance. Both are NaN where no running statistics are kept.
    """

    spread: float
    dead: float
    mean_drift: float
    variance_drift: float


class Watch:
    """The figures of every SyncBatchNorm of a module by name, as of its last training batch."""

    def __init__(self, module: nn.Module):
        self._figures: dict[str, Tensor] = {}
        self._ends: list[Callable[[], None]] = []
        for name, norm in module.named_modules():
            if isinstance(norm, SyncBatchNorm):
                self._ends.append(norm.observe(self._observer(name, norm)))

    def read(self) -> dict[str, Health]:
        """Every norm that has seen a batch, in the order of the forward pass. Waits for the device once."""
        if not self._figures:
            return {}
        table = torch.stack(list(self._figures.values())).tolist()
        return {name: Health(*row) for name, row in zip(self._figures, table, strict=True)}

    def close(self) -> None:
        """Watch no longer."""
        for end in self._ends:
            end()
        self._ends.clear()

    def _observer(self, name: str, norm: SyncBatchNorm) -> Callable[[Tensor], None]:
        def observe(rows_RP: Tensor) -> None:
            self._figures[name] = _figures(rows_RP, norm)

        return observe


@contextmanager
def watch(module: nn.Module) -> Iterator[Watch]:
    """Watch the norms of a module for as long as the context lasts."""
    watching = Watch(module)
    try:
        yield watching
    finally:
        watching.close()


@torch.no_grad()
def _figures(rows_RP: Tensor, norm: SyncBatchNorm) -> Tensor:
    """Health's fields (4,)."""
    group = merge_packets(rows_RP)
    variance_C = group.variance_C()
    varies_C = variance_C > 0
    inverse_C = torch.where(varies_C, 1 / variance_C, 0.0)
    count_R1, mean_RC = rows_RP[:, :1], rows_RP[:, 1 : 1 + norm.num_features]
    between_C = (count_R1 * (mean_RC - group.mean_C).square()).sum(0) / group.count
    spread = (between_C * inverse_C).mean().sqrt() if len(rows_RP) > 1 else variance_C.new_full((), torch.nan)
    is_dead_C = ~varies_C
    if norm.weight is not None and norm.bias is not None:
        is_dead_C = is_dead_C | (norm.weight == 0) | (norm.bias < -SILENT * norm.weight.abs())
    drifts = variance_C.new_full((2,), torch.nan)
    if norm.running_mean is not None and norm.running_var is not None:
        mean_drift = ((norm.running_mean - group.mean_C).square() * inverse_C).mean().sqrt()
        ratio_C = torch.where(varies_C, norm.running_var.double() * inverse_C, 1.0)
        drifts = torch.stack([mean_drift, ratio_C.log().abs().sum() / varies_C.sum()])
    return torch.stack([spread, is_dead_C.double().mean(), *drifts])
