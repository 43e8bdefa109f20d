"""How sure a score is: intervals of proportions, and of the difference of two on the same images.

Wilson (1927): the proportions p that would not make k of n unlikely, (k + z^2/2 -+ z sqrt(k (n - k)/n + z^2/4)) /
(n + z^2). Difference: the images drawn anew with replacement (Efron 1979). Drawing n of n images of three kinds (one is
right where the other is wrong, the reverse, no difference) is drawing their counts from a multinomial, so that many
draws cost nothing and come from one seed.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 100_000
_SEED = 20150211


class Interval(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


def wilson(count: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """The share count / total of independent trials; of none, 0 with the interval of all that it may be."""
    if not total:
        return Interval(0.0, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle, half = count + z * z / 2, z * math.sqrt(count * (total - count) / total + z * z / 4)
    low, high = (middle - half) / (total + z * z), (middle + half) / (total + z * z)
    return Interval(count / total, low if count else 0.0, high if count < total else 1.0)


def paired_difference(
    left_N: NDArray[np.bool_], right_N: NDArray[np.bool_], confidence: float = CONFIDENCE, draws: int = DRAWS
) -> Interval:
    """Share of left minus share of right, of the same images; percentiles of the bootstrap over images.

    Raises ValueError for other shapes.
    """
    if left_N.shape != right_N.shape:
        raise ValueError(f"{len(left_N)} and {len(right_N)} values are not of the same images")
    total = len(left_N)
    if not total:
        return Interval(0.0, 0.0, 0.0)
    more, less = int((left_N & ~right_N).sum()), int((right_N & ~left_N).sum())
    drawn = np.random.default_rng(_SEED).multinomial(total, np.array([more, less, total - more - less]) / total, draws)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / total, [tail, 1 - tail])
    return Interval((more - less) / total, float(low), float(high))
