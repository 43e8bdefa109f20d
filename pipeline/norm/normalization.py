"""One layer's arithmetic in plain operations, for any device and for torch.compile, and the oracle of the kernels.

`fused` offers the same names. Forward:  y = (x - mean) scale + beta,  scale = gamma / sqrt(var + eps).
Backward:  dx = scale (g - mean(g) - xhat mean(g xhat)),  g = dy where y > 0 if a ReLU follows, else dy; both means
over the group.   Legend: C channels, R ranks, P = 2C + 1 numbers of a packet (moments.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.norm.moments import Moments, batch_moments, merge_packets, pack


class Running(NamedTuple):
    """The running statistics of a layer, to be updated in place. momentum: None, and all batches weigh the same."""

    mean_C: Tensor
    var_C: Tensor
    batches: Tensor  # () int64
    momentum: float | None

    def track(self, moments: Moments) -> None:
        """Take in a batch: its variance with n - 1 over the whole group, as nn.BatchNorm2d keeps it."""
        is_batch = moments.count > 0  # one without any image is none
        self.batches.add_(is_batch.long())
        seen = self.batches.clamp(min=1).double()
        weight = (1.0 / seen if self.momentum is None else self.momentum) * is_batch.double()
        for running_C, batch_C in ((self.mean_C, moments.mean_C), (self.var_C, moments.unbiased_variance_C())):
            running_C.copy_(running_C + weight * (batch_C - running_C))


class Statistics(NamedTuple):
    """What a layer normalizes with. mean and scale are of the arithmetic: float64 for float64 inputs, else float32."""

    mean_C: Tensor
    scale_C: Tensor
    invstd_C: Tensor  # float64
    total: Tensor  # () float64, values per channel of the whole group


def packet(x: Tensor) -> Tensor:
    """The moments of x (N, C, *) as a packet (P,) in float64; N may be 0."""
    return pack(batch_moments(x))


def statistics(
    rows_RP: Tensor, weight_C: Tensor | None, eps: float, arithmetic: torch.dtype, running: Running | None
) -> Statistics:
    """Those of the union of the ranks' packets, which `running` takes in."""
    moments = merge_packets(rows_RP)
    if running is not None:
        running.track(moments)
    invstd_C = (moments.variance_C() + eps).rsqrt()
    scale_C = invstd_C if weight_C is None else invstd_C * weight_C
    return Statistics(moments.mean_C.to(arithmetic), scale_C.to(arithmetic), invstd_C, moments.count)


def normalized(x: Tensor, known: Statistics, bias_C: Tensor | None, activation: str | None) -> Tensor:
    """y, in the type of x."""
    view = [1, -1] + [1] * (x.dim() - 2)
    if torch.compiler.is_compiling():  # what a trace changes in place has no gradient in torch 2.11
        y = (x - known.mean_C.view(view)) * known.scale_C.view(view)
        y = y if bias_C is None else y + bias_C.view(view)
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        return y.relu() if activation == "relu" else y
    y = (x - known.mean_C.view(view)).mul_(known.scale_C.view(view))
    if bias_C is not None:
        y.add_(bias_C.view(view))
    y = y.to(x.dtype)
    return y.relu_() if activation == "relu" else y


class Backward:
    """A layer's share of a backward: its sums over this rank, then dx when those over the group are known.

    y: the output, where an activation follows; it tells where that was flat.
    """

    def __init__(self, dy: Tensor, x: Tensor, y: Tensor | None, known: Statistics, weight_C: Tensor | None):
        self.x, self.known, self.weight_C = x, known, weight_C
        self.arithmetic, self.view = known.mean_C.dtype, [1, -1] + [1] * (x.dim() - 2)
        reduced = [d for d in range(x.dim()) if d != 1]
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        self.dy = dy.to(self.arithmetic)
        self.deviation = x - known.mean_C.view(self.view)
        sum_dy_C = self.dy.sum(reduced).double()
        sum_dy_xhat_C = (self.dy * self.deviation).sum(reduced).double() * known.invstd_C
        self.sums_2C = torch.cat([sum_dy_C, sum_dy_xhat_C])

    def dx(self, totals_RP: Tensor) -> Tensor:
        """Dx = scale dy - (scale mean(dy xhat) invstd) deviation - scale mean(dy); to be asked for once.

        totals_RP: the sums of the ranks (R, 2C), which are added up here.
        """
        mean_dy_C, mean_dy_xhat_C = (totals_RP.sum(0) / self.known.total.clamp(min=1)).chunk(2)
        scale_C = self.known.invstd_C if self.weight_C is None else self.known.invstd_C * self.weight_C
        slope_C = -scale_C * mean_dy_xhat_C * self.known.invstd_C
        dx = self.deviation.mul_(slope_C.to(self.arithmetic).view(self.view))
        dx.add_((-scale_C * mean_dy_C).to(self.arithmetic).view(self.view))
        dx.addcmul_(self.dy, scale_C.to(self.arithmetic).view(self.view))
        return dx.to(self.x.dtype)
