"""Norms that keep the statistics that were loaded: for fine-tuning on few images, or on batches that are small."""

from __future__ import annotations

from torch import nn

from pipeline.norm.sync_batch_norm import SyncBatchNorm

STATISTICS, ALL = HOLDS = ("statistics", "all")


def freeze(module: nn.Module, what: str) -> int:
    """Let every SyncBatchNorm of module normalize with its running statistics, in training, too, for good.

    what: "statistics": gamma and beta are trained on; "all": they are held as well. Nothing is exchanged, and running
    statistics stay as they are, or as they are loaded. Returns how many norms there are. Raises ValueError for another
    `what`, or for a norm that keeps no running statistics.
    """
    if what not in HOLDS:
        raise ValueError(f"what = {what!r} is not offered; choose one of {list(HOLDS)}")
    norms = [norm for norm in module.modules() if isinstance(norm, SyncBatchNorm)]
    for norm in norms:
        if norm.running_mean is None:
            raise ValueError(f"SyncBatchNorm({norm.num_features}) keeps no running statistics, and cannot be frozen")
        norm.frozen = True
        norm.eval()
        if what == ALL:
            norm.requires_grad_(requires_grad=False)
    return len(norms)
