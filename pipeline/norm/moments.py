"""Channel moments (count, mean, M2) and their merge: the algebra of synchronized batch normalization.

var = M2 / count. Merging the moments of disjoint sets gives those of their union, for any split over
ranks (Chan, Golub & LeVeque 1979). A packet is one set's moments laid out flat, ready to be exchanged:
[count, mean_C, m2_C], 2C + 1 numbers in float64.   Legend: N images, C channels, R ranks, P = 2C + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of one or several sets of values, in float64."""

    count: Tensor  # () values per channel
    mean_C: Tensor
    m2_C: Tensor  # sum of squared deviations from the mean

    @staticmethod
    def empty(channels: int, device: torch.device) -> Moments:
        """What a rank without images sends: zeros, which the merge weighs with a count of 0."""
        zero_C = torch.zeros(channels, dtype=torch.float64, device=device)
        return Moments(zero_C.new_zeros(()), zero_C, zero_C)

    def variance_C(self) -> Tensor:
        """Biased variance, the one that normalizes."""
        return self.m2_C / self.count.clamp(min=1)

    def unbiased_variance_C(self) -> Tensor:
        """Variance with n - 1 in the divisor, the one that running statistics keep (paper, Algorithm 2)."""
        return self.m2_C / (self.count - 1).clamp(min=1)


def batch_moments(x: Tensor) -> Moments:
    """Moments of each channel of x (N, C, *), computed in float32 at least; N may be 0.

    Two passes: the first guess of the mean may be off by its rounding, so the mean deviation from
    that guess corrects both results. Accurate at any offset, with no memory of earlier batches.
    """
    channels = x.shape[1]
    if x.numel() == 0:
        return Moments.empty(channels, x.device)
    values = x if x.dtype in (torch.float32, torch.float64) else x.float()
    reduced = [d for d in range(x.dim()) if d != 1]
    per_channel = [1, channels] + [1] * (x.dim() - 2)
    guess_C = values.mean(reduced)
    # M2, not E[x^2] - E[x]^2: at mean 1e3, variance 1, float32 the difference form is off by 10 %, this one
    # by 1e-6 (tests/norm/test_moments.py).
    deviation = values - guess_C.view(per_channel)
    count = x.numel() // channels
    drift_C = deviation.mean(reduced).double()
    m2_C = deviation.square_().sum(reduced).double() - count * drift_C.square()
    return Moments(drift_C.new_full((), count), guess_C.double() + drift_C, m2_C.clamp(min=0))


def pack(moments: Moments) -> Tensor:
    """One set's moments as a packet (P,)."""
    return torch.cat([moments.count.reshape(1), moments.mean_C, moments.m2_C])


def merge_packets(packets_RP: Tensor) -> Moments:
    """Moments of the union of R disjoint sets, summed in the order of their rows."""
    count_R1, mean_RC, m2_RC = _columns(packets_RP)
    count = count_R1.sum()
    mean_C = (count_R1 * mean_RC).sum(0) / count.clamp(min=1)
    m2_C = (m2_RC + count_R1 * (mean_RC - mean_C).square()).sum(0)
    return Moments(count, mean_C, m2_C)


def merge(*sets: Moments) -> Moments:
    """Moments of the union of disjoint sets."""
    return merge_packets(torch.stack([pack(each) for each in sets]))


def sums_of(packet_P: Tensor) -> Tensor:
    """A packet as power sums [n, n mean, M2 + n mean^2] (P,): to be added up over ranks, then `packet_of` them.

    Float64 leaves about 1e-16 (mean / std)^2 of relative error in the variance, so values in float32
    lose nothing; `merge_packets` is the exact form.
    """
    count_1, mean_C, m2_C = _columns(packet_P)
    first_C = count_1 * mean_C
    return torch.cat([count_1, first_C, m2_C + first_C * mean_C])


def packet_of(sums_P: Tensor) -> Tensor:
    """The packet of the union from the sum of every rank's `sums_of`."""
    count_1, first_C, second_C = _columns(sums_P)
    mean_C = first_C / count_1.clamp(min=1)
    return torch.cat([count_1, mean_C, (second_C - first_C * mean_C).clamp(min=0)])


def _columns(packets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = (packets.shape[-1] - 1) // 2
    count, first, second = torch.split(packets, [1, channels, channels], dim=-1)
    return count, first, second
