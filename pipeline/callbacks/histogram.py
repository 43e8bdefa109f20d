"""How the gradient of a layer is distributed: a histogram with the same bins for all layers, steps and runs.

Any two can be laid over each other: bins are a quarter of a decade wide, from 1e-10 to 100 on both sides of a middle
one, which has all that is nearer to zero.   Legend: V values of a layer, B bins, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

VALUES = 65_536  # of a layer that are looked at, evenly spread
LOW, HIGH, A_DECADE = -10, 2, 4  # powers of ten of the outer edges, and bins between two powers
MAGNITUDES_E = 10.0 ** (np.arange(LOW * A_DECADE, HIGH * A_DECADE + 1) / A_DECADE)
EDGES_E: NDArray[np.float64] = np.concatenate([-MAGNITUDES_E[::-1], MAGNITUDES_E])


@dataclass(frozen=True, slots=True)
class Histogram:
    """Of one layer's gradient. values: how many it has in all; the rest is of those that were looked at.

    deviation: from zero, the root of the mean square. kurtosis: mean of the fourth power / square of that of the
    second; 3 for a Gaussian, more for heavy tails. tail: the 99.9th percentile of |g| over its median; 4.88 for a
    Gaussian. counts_B: between EDGES_E; what lies beyond them is in the outermost bins.
    """

    values: int
    deviation: float
    kurtosis: float
    tail: float
    counts_B: NDArray[np.int64]


def histogram(gradient: Tensor) -> Histogram:
    """Of a gradient of any shape; values that are not finite are left out. Waits for the device."""
    flat = gradient.detach().reshape(-1)
    stride = -(-len(flat) // VALUES) if len(flat) else 1
    sample_V = flat[:: stride | 1].double().cpu().numpy()
    sample_V = sample_V[np.isfinite(sample_V)]
    counts_B, _ = np.histogram(np.clip(sample_V, EDGES_E[0], EDGES_E[-1]), EDGES_E)
    magnitude_V = np.abs(sample_V)
    largest = magnitude_V.max(initial=0.0)
    if largest == 0:
        return Histogram(len(flat), 0.0, float("nan"), float("nan"), counts_B)
    scaled_V = magnitude_V / largest  # the fourth power of a small number is zero
    second = float(np.square(scaled_V).mean())
    median, far = np.quantile(scaled_V, [0.5, 0.999])
    return Histogram(
        len(flat), float(largest) * second**0.5, float(np.square(np.square(scaled_V)).mean()) / second**2,
        float(far / median) if median > 0 else float("inf"), counts_B,
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that have more than one dimension, by the names of their layers."""
    return {name.removesuffix(".weight"): each for name, each in model.named_parameters() if each.dim() > 1}
