"""Population statistics from many training batches (Ioffe & Szegedy 2015, Algorithm 2).

For each norm E[x] = mean of the batch means, Var[x] = mean of the unbiased batch variances, all norms
in one pass, on batch statistics, with the weights held still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.norm.collectives import average_over_world
from pipeline.norm.sync_batch_norm import SyncBatchNorm

Batch = TypeVar("Batch")


def tracked_norms(module: nn.Module) -> list[SyncBatchNorm | _BatchNorm]:
    """Every norm of the module that keeps running statistics, in the order of its modules."""
    return [m for m in module.modules() if isinstance(m, SyncBatchNorm | _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def estimate(module: nn.Module, batches: Iterable[Batch], forward: Callable[[Batch], object] | None = None) -> int:
    """Set the running statistics of every norm in module to the population's; returns the number of batches.

    batches: training batches of equal size, taken until they end; every rank must bring as many.
    forward: runs the module on one batch; module itself if absent. Weights, training flags and
    momenta are left as found. Where ranks normalize in groups, all ranks end with the merge of all.
    Without a batch the statistics stay as they were.
    """
    norms = tracked_norms(module)
    if not norms:
        return 0
    run: Callable[[Batch], object] = forward or module
    was_training = {m: m.training for m in module.modules()}
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        module.train()
        for count, batch in enumerate(batches, 1):
            if count == 1:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # all batches weigh the same: the mean that Algorithm 2 asks for
            run(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for each, training in was_training.items():
            each.training = training
    merge_groups(module)
    return count


@torch.no_grad()
def merge_groups(module: nn.Module) -> None:
    """Average the running statistics over all ranks: where they normalize in groups, each group has its own."""
    norms = tracked_norms(module)
    if not norms:
        return
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    merged = average_over_world(torch.cat(buffers))
    for buffer, value in zip(buffers, torch.split(merged, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(value)
