"""The order in which gradients are added up over ranks: the same from a start's first step on.

DDP sums the gradients of its first step in buckets of parameters as they are listed, and lays the buckets out anew for
the second, in the order in which gradients came. From three ranks on the place in a bucket decides in which order ranks
are added up, so that the first step after a resume would have other bits than the same step of an uninterrupted run
(tests/multiprocess/test_resume.py). One pass before the first step, of a black image whose gradients are thrown
away, makes the final layout the only one. The alternative, DDP's search for unused parameters, keeps the first layout
at the price of a walk over the graph and one more exchange a step.
"""

from __future__ import annotations

import lightning
import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.batch import Batch, collate


class GradientLayout(lightning.Callback):
    """size: pixels a side."""

    def __init__(self, size: int):
        self.size = size

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        network = trainer.strategy.model
        if not isinstance(network, DistributedDataParallel):
            return
        buffers = [buffer.clone() for buffer in pl_module.buffers()]
        batch: Batch = trainer.strategy.batch_to_device(self._black())
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
            outputs = [output for output in network(batch) if output is not None]
        sum(output.sum() for output in outputs).backward()
        pl_module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(pl_module.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _black(self) -> Batch:
        return collate([], [], [], [], [], self.size, padded_to=1)
