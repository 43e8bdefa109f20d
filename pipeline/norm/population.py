"""Population statistics from many training batches, of all norms in one pass, with the weights held still.

batches (Ioffe & Szegedy 2015, Algorithm 2): E[x] = mean of the batch means, Var[x] = mean of the unbiased batch
variances. aggregate (Wu & Johnson 2021, section 3.2): the moments of all values of all batches, that is
Var[x] = E[var_B] + Var[mean_B], which also counts how the batches' means differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.norm.collectives import average_over_world, sum_over_world
from pipeline.norm.moments import Moments, batch_moments, merge, merge_packets
from pipeline.norm.per_activation import PlainPerActivationNorm
from pipeline.norm.sync_batch_norm import SyncBatchNorm

Batch = TypeVar("Batch")
Norm = SyncBatchNorm | _BatchNorm
BATCHES, AGGREGATE = FORMS = ("batches", "aggregate")


def tracked_norms(module: nn.Module) -> list[Norm]:
    """Every norm of the module that keeps running statistics and is not frozen, in the order of its modules."""
    return [
        m
        for m in module.modules()
        if isinstance(m, Norm) and m.running_mean is not None and not getattr(m, "frozen", False)
    ]


@torch.no_grad()
def estimate(
    module: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None = None,
    *,
    images: int = 0,
    form: str = BATCHES,
) -> int:
    """Set the running statistics of every norm in module to the population's; returns the number of batches.

    batches: training batches of equal size, taken until they end; every rank must bring as many. images: of
    all ranks, after which no other batch is taken, of batches that are a tensor or begin with one; 0 = all.
    forward: runs the module on one batch; module itself if absent. form: "batches" or "aggregate".
    Weights, training flags and momenta are left as found. Where ranks normalize in groups, all ranks end
    with the merge of all. Without a batch the statistics stay as they were. Averaged weights (EMA, soups) have
    activations of their own: give the module that holds them. Raises ValueError for another form.
    """
    if form not in FORMS:
        raise ValueError(f"form = {form!r} is not offered; choose one of {list(FORMS)}")
    norms = tracked_norms(module)
    if not norms:
        return 0
    run: Callable[[Batch], object] = forward or module
    count = 0
    assert norms[0].running_mean is not None
    device = norms[0].running_mean.device
    with on_batch_statistics(module, norms), moments_seen(norms if form == AGGREGATE else []) as seen:
        for count, batch in enumerate(_limited(batches, images, device), 1):
            if count == 1:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # all batches weigh the same: the mean that Algorithm 2 asks for
            run(batch)
    if seen:
        _merge_moments(seen)
    else:
        merge_groups(module)
    return count


@torch.no_grad()
def merge_groups(module: nn.Module) -> None:
    """Average the running statistics over all ranks: where they normalize in groups, each group has its own."""
    norms = tracked_norms(module)
    if not norms:
        return
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    _write(buffers, average_over_world(torch.cat(buffers)))


def _merge_moments(seen: dict[Norm, Moments]) -> None:
    """Set each norm's running statistics to its moments, merged over all ranks, whatever their shares."""
    counts = torch.cat([moments.count.expand_as(moments.mean_C) for moments in seen.values()])
    means = torch.cat([moments.mean_C for moments in seen.values()])
    squares = torch.cat([moments.m2_C for moments in seen.values()])
    count = sum_over_world(counts).clamp(min=1)
    mean = sum_over_world(counts * means) / count
    # Around the mean of all ranks: their squares themselves would leave no digits where a mean is large.
    variance = sum_over_world(squares + counts * (means - mean).square()) / count
    _write([norm.running_mean for norm in seen if norm.running_mean is not None], mean)
    _write([norm.running_var for norm in seen if norm.running_var is not None], variance)


def _write(buffers: list[Tensor], values: Tensor) -> None:
    for buffer, value in zip(buffers, torch.split(values, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(value)


def _limited(batches: Iterable[Batch], images: int, device: torch.device) -> Iterator[Batch]:
    """As many on each rank: a rank that went on alone would wait for the others in the exchange of its norms."""
    seen = 0.0
    for batch in batches:
        yield batch
        if images:
            size = len(batch if isinstance(batch, Tensor) else batch[0])  # type: ignore[index]
            seen += float(sum_over_world(torch.tensor(size, dtype=torch.float64, device=device)))
            if seen >= images:
                return


@contextmanager
def on_batch_statistics(module: nn.Module, norms: list[Norm]) -> Iterator[None]:
    """In training mode; flags and momenta are given back."""
    was_training = {m: m.training for m in module.modules()}
    momenta = [norm.momentum for norm in norms]
    try:
        module.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for each, training in was_training.items():
            each.training = training


@contextmanager
def moments_seen(norms: list[Norm]) -> Iterator[dict[Norm, Moments]]:
    """The moments of all that goes through each norm, of this rank's group, from now on."""
    seen: dict[Norm, Moments] = {}

    def add(norm: Norm, moments: Moments) -> None:
        seen[norm] = merge(seen[norm], moments) if norm in seen else moments

    ends: list[Callable[[], None]] = []
    for norm in norms:
        if isinstance(norm, SyncBatchNorm):
            ends.append(norm.observe(lambda rows_RP, norm=norm: add(norm, merge_packets(rows_RP))))  # type: ignore[misc]
        else:
            hook = norm.register_forward_pre_hook(lambda norm, given: add(norm, batch_moments(_flat(norm, given[0]))))
            ends.append(hook.remove)
    try:
        yield seen
    finally:
        for end in ends:
            end()


def _flat(norm: Norm, x: Tensor) -> Tensor:
    return norm.places.flat(x) if isinstance(norm, PlainPerActivationNorm) else x
