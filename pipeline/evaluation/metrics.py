"""Metrics as sums that merge: (loss, correct, correct among five, seen), divided once at the end.

Legend: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over all images seen; top1 and top5 are fractions."""

    loss: float
    top1: float
    top5: float
    images: int


class Sums:
    """Running sums of one pass, in float64 on the device, so that no batch waits for the host."""

    def __init__(self, device: torch.device):
        self.values_4 = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss_N: Tensor, logits_NK: Tensor, label_N: Tensor, weight_N: Tensor) -> None:
        """Count a batch. weight_N: 1 for an image, 0 for padding."""
        if not len(label_N):
            return
        best_N5 = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
        hit_N5 = best_N5 == label_N[:, None]
        columns = (loss_N, hit_N5[:, 0], hit_N5.any(1), torch.ones_like(weight_N))
        self.values_4 += torch.stack([(column.double() * weight_N.double()).sum() for column in columns])

    def merged(self) -> Scores:
        """Scores over the images of all ranks. A collective, and a wait for the device."""
        loss, top1, top5, seen = self.totals()
        divisor = max(seen, 1)
        return Scores(loss / divisor, top1 / divisor, top5 / divisor, round(seen))

    def totals(self) -> list[float]:
        """The sums over all ranks. A collective, and a wait for the device."""
        total_4 = self.values_4.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total_4)
        values: list[float] = total_4.tolist()
        return values

    def reset(self) -> None:
        self.values_4.zero_()
