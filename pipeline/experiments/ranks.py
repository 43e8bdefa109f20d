"""What normalizes together: a batch split over processes against the same images in one.

Each rank is a process with a gloo group; forward and backward in float64, of one layer and of BN-Inception with its 69.
Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.launch.failure import NOT_AGAIN, FailedRunError
from pipeline.models import build
from pipeline.norm import SyncBatchNorm
from pipeline.report.record import Values

PARTS = ("outputs", "input gradients", "running statistics")
KINDS = ("layer", "network")
_CHANNELS, _SIDE, _CLASSES = 8, 12, 10
_SECONDS, _LOOK_SECONDS = 300.0, 0.05
Passed = dict[str, Values]  # by part


def differences(ranks: int, images: int, groups: Sequence[int]) -> dict[int, dict[str, dict[str, float]]]:
    """The largest difference between ranks with so many images each and one process: of each group, kind and part.

    groups: how many ranks share statistics; one process then normalizes the images of so many of them at a time.
    Raises FailedRunError where a rank fails, or does not end.
    """
    with tempfile.TemporaryDirectory() as place:
        _run(ranks, images, groups, Path(place))
        apart = {}
        for group in groups:
            found = [dict(np.load(_file(Path(place), rank, group))) for rank in range(ranks)]
            apart[group] = _difference(found, images, group)
        return apart


def _difference(found: Sequence[Passed], images: int, group: int) -> dict[str, dict[str, float]]:
    """found: of each rank."""
    apart = {kind: dict.fromkeys(PARTS, 0.0) for kind in KINDS}
    for first in range(0, len(found), group):
        whole = passed(len(found) * images, slice(first * images, (first + group) * images), group_size=1)
        for rank in range(first, first + group):
            mine = slice((rank - first) * images, (rank - first + 1) * images)
            for kind in KINDS:
                for part in PARTS:
                    theirs = whole[f"{kind} {part}"]
                    theirs = theirs if part == PARTS[2] else theirs[mine]  # statistics are of no image
                    off = float(np.abs(found[rank][f"{kind} {part}"] - theirs).max())
                    apart[kind][part] = max(apart[kind][part], off)
    return apart


def passed(images: int, mine: slice, *, group_size: int) -> Passed:
    """Through layer and network, forward and backward, some of so many images that are the same in every process."""
    drawn = torch.Generator().manual_seed(0)
    found: Passed = {}
    for kind, channels in zip(KINDS, (_CHANNELS, 3), strict=True):
        module = _module(kind, group_size)
        x_NCHW = torch.randn(images, channels, _SIDE, _SIDE, generator=drawn, dtype=torch.float64) * 2 + 3
        x_NCHW = x_NCHW[mine].requires_grad_()
        y = module(x_NCHW)
        y = y if isinstance(y, Tensor) else y.main_NK
        dy = torch.randn(images, *y.shape[1:], generator=drawn, dtype=torch.float64)[mine]
        y.backward(dy)
        assert x_NCHW.grad is not None
        running = torch.cat([b.flatten() for name, b in module.named_buffers() if "running" in name])
        for part, value in zip(PARTS, (y.detach(), x_NCHW.grad, running), strict=True):
            found[f"{kind} {part}"] = value.numpy()
    return found


def _module(kind: str, group_size: int) -> nn.Module:
    norm = partial(SyncBatchNorm, group_size=group_size)
    if kind == "layer":
        return norm(_CHANNELS).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build("bn_inception", num_classes=_CLASSES, norm=norm, width=0.125, stem="small").double()


def _run(ranks: int, images: int, groups: Sequence[int], place: Path) -> None:
    # forkserver: torch is imported once, by a process that has no threads to copy.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=_rank, args=(rank, ranks, images, groups, str(place)), daemon=True)
                 for rank in range(ranks)]  # fmt: skip
    end = time.monotonic() + _SECONDS
    try:
        for process in processes:
            process.start()
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes):
                break
            if time.monotonic() > end:
                raise FailedRunError(f"{ranks} processes that share statistics did not end in {_SECONDS:g} s",
                                     code=NOT_AGAIN)  # fmt: skip
            time.sleep(_LOOK_SECONDS)
        if any(process.exitcode for process in processes):
            raise FailedRunError("one of the processes that share statistics failed", code=NOT_AGAIN)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _rank(rank: int, ranks: int, images: int, groups: Sequence[int], place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=ranks)
    try:
        mine = slice(rank * images, (rank + 1) * images)
        for group in groups:
            found = passed(ranks * images, mine, group_size=group)
            np.savez(_file(Path(place), rank, group), allow_pickle=False, **found)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _file(place: Path, rank: int, group: int) -> Path:
    return place / f"rank-{rank}-of-{group}.npz"
