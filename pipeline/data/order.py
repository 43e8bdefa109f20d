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

_SHARDS, _WINDOW = 1, 2  # what a key is for


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
