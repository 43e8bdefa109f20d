"""The order of samples: a pure function of (seed, epoch, index).

Shards are permuted, K consecutive ones form a window, samples are permuted inside their window. No
buffer, so nothing to save: a position is the pair (epoch, index). Ranks, workers, prefetch and batch
size do not enter. Numbers count samples in the order of the shards' names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.keyed_random import mixed, permutation

SORTED = 0.8  # label mixing of shards below which they count as sorted by class
WELL_MIXED = 0.98  # shuffle quality below which batches differ visibly from random ones
_SHARDS, _WINDOW, _QUALITY = 1, 2, 5  # what a key is for


class Order:
    """Order of one split's samples. shard_counts: samples of each shard. window: shards in one; 0 = all of them."""

    def __init__(self, shard_counts: Sequence[int], *, seed: int, window: int = 0):
        if window < 0:
            raise ValueError(f"data.window = {window} is negative; give a number of shards, or 0 for a full shuffle")
        self.counts = np.asarray(shard_counts, dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # number of each shard's first sample
        self.seed, self.window = seed, min(window, len(self.counts)) or max(len(self.counts), 1)
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._window: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return int(self.first[-1])

    def sample(self, epoch: int, index: int) -> int:
        """Number of the sample at place `index` of an epoch. Raises IndexError outside range(len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} lies outside the epoch of {len(self)} samples")
        shards, ends = self._plan(epoch)
        window = int(np.searchsorted(ends, index, side="right"))
        begin = int(ends[window - 1]) if window else 0
        return int(self._samples(epoch, window, shards)[index - begin])

    def window_of(self, epoch: int, index: int) -> int:
        """Number of the window in which a place lies; the end lies in the last."""
        _, ends = self._plan(epoch)
        return min(int(np.searchsorted(ends, index, side="right")), len(ends) - 1)

    def shards_from(self, epoch: int, window: int) -> list[int]:
        """Shards in the order in which windows come to them, from a window to the epoch's end."""
        shards, _ = self._plan(epoch)
        return [int(shard) for shard in shards[window * self.window :]]

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's order of shards, and the place where each window ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = permutation(len(self.counts), mixed(self.seed, epoch, _SHARDS))
            ends = np.cumsum(self.counts[shards])[self.window - 1 :: self.window]
            if not len(ends) or ends[-1] != len(self):
                ends = np.append(ends, len(self))
            self._epoch = (epoch, shards, ends)
        return self._epoch[1], self._epoch[2]

    def _samples(self, epoch: int, window: int, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._window is None or self._window[0] != (epoch, window):
            chosen = shards[window * self.window : (window + 1) * self.window]
            samples = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in chosen])
            shuffled = samples[permutation(len(samples), mixed(self.seed, epoch, _WINDOW, window))]
            self._window = ((epoch, window), shuffled)
        return self._window[1]


def shuffle_quality(order: Order, label_S: NDArray[np.integer], batch_size: int, batches: int = 32) -> float:
    """How well mixed the labels of a batch are: their entropy over that of batches drawn from all samples; 1 = as well.

    The mean over `batches` batches, of 1,024 samples at most, at even distances in the first epoch.
    """
    classes = int(label_S.max()) + 1
    batch_size = min(batch_size, len(order), 1024)
    starts = np.linspace(0, len(order) - batch_size, num=batches, dtype=np.int64)
    drawn = permutation(len(order), mixed(order.seed, _QUALITY))
    ours = [_entropy(label_S[[order.sample(0, int(s) + i) for i in range(batch_size)]], classes) for s in starts]
    uniform = [_entropy(label_S[drawn[s : s + batch_size]], classes) for s in starts]
    return float(np.mean(ours) / np.mean(uniform)) if any(uniform) else 1.0


def shard_mixing(shard_counts: Sequence[int] | NDArray[np.int64], label_S: NDArray[np.integer]) -> float:
    """Label entropy of a shard over that of as many samples of all, in the mean; near 0 = sorted by class."""
    classes = int(label_S.max()) + 1
    drawn = label_S[permutation(len(label_S), mixed(_QUALITY))]
    ends = np.cumsum(shard_counts)
    pieces = [slice(end - count, end) for count, end in zip(shard_counts, ends, strict=True)]
    ours, uniform = ([_entropy(labels[piece], classes) for piece in pieces] for labels in (label_S, drawn))
    return float(np.mean(ours) / np.mean(uniform)) if any(uniform) else 1.0


def _entropy(label_N: NDArray[np.integer], classes: int) -> float:
    share_K = np.bincount(label_N, minlength=classes) / len(label_N)
    return float(-(share_K[share_K > 0] * np.log2(share_K[share_K > 0])).sum())
