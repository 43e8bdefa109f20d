"""Images of a split, a bad one replaced: the order of samples and the shape of a batch never give way to it.

What stands in is a function of (seed, epoch, sample), so that it too is the same on any ranks and workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from pipeline.data.dataset import Dataset
from pipeline.data.decode import DecodeError, Pixels
from pipeline.data.keyed_random import mixed
from pipeline.data.shards import DataError
from pipeline.data.split import Split
from pipeline.data.stream import ShardStream

_SUBSTITUTE = 4  # what a key is for; order.py has 1 and 2, loader.py 3
_TRIES_IN_SHARD, _TRIES = 8, 16
Made = TypeVar("Made")


class Fault(NamedTuple):
    """A sample that could not be used. offset: its bytes' in the shard; substitute: the sample in its place, or -1.

    tries: how many were looked at for it, of which the last was sound.
    """

    sample: int
    substitute: int
    shard: str
    key: str
    offset: int
    reason: str
    tries: int = 0


class Images:
    """Samples of one split, decoded by whoever asks."""

    def __init__(self, stream: ShardStream):
        self.stream = stream

    @property
    def split(self) -> Split:
        return self.stream.split

    def load(self, sample: int, crop: Callable[[bytes], Made]) -> Made | Fault:
        """What is made of the sample, or why it cannot be. Raises DataError for a lost shard."""
        try:
            return crop(self.stream.read(sample))
        except DecodeError as error:
            return self._fault(sample, str(error))

    def load_or_substitute(
        self, sample: int, crop: Callable[[bytes], Pixels], seed: int, epoch: int
    ) -> tuple[Pixels, int, list[Fault]]:
        """A crop, the sample it is of, and the fault if it is another. Raises DataError after 16 bad ones in a row.

        The first eight candidates are of the same shard, which is at hand; then come all.
        """
        pixels = self.load(sample, crop)
        if not isinstance(pixels, Fault):
            return pixels, sample, []
        fault = pixels
        for tries in range(1, _TRIES + 1):
            candidate = self._candidate(sample, mixed(seed, epoch, sample, _SUBSTITUTE, tries), tries)
            found = self.load(candidate, crop)
            if not isinstance(found, Fault):
                return found, candidate, [fault._replace(substitute=candidate, tries=tries)]
            pixels = found
        raise DataError(
            f"{fault.shard}: {fault.key} and {_TRIES} samples to stand in for it are bad (last: {pixels.reason}); "
            f"run `pipeline shards verify --decode {self.split.root}`"
        )

    def _candidate(self, sample: int, bits: int, attempt: int) -> int:
        if attempt > _TRIES_IN_SHARD:
            return bits % len(self.split)
        shard = self.split.shard_S[sample]
        first, last = np.searchsorted(self.split.shard_S, [shard, shard + 1])
        return int(first) + bits % int(last - first)

    def _fault(self, sample: int, reason: str) -> Fault:
        split = self.split
        where, offset = split.entries[int(split.shard_S[sample])].shard, int(split.offset_S[sample])
        return Fault(sample, -1, where, split.key(sample), offset, reason)


def open_images(dataset: Dataset, split: str, num_classes: int, window: int = 0) -> Images:
    """The images of one split, to be read in windows of so many shards; 0 = all. Raises DataError."""
    return Images(ShardStream(dataset, dataset.split(split, num_classes), keep=min(64, window + 1) if window else 256))
