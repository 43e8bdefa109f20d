"""Shards brought into the node's cache before the order comes to them: this window's and the next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

from pipeline.data.cache import ShardCache
from pipeline.data.order import Order
from pipeline.data.prefetch import Prefetch
from pipeline.data.shards import DataError, ShardEntry
from pipeline.data.split import Split

_REPORT_SECONDS = 10.0


def check_room(limit: int, entries: Sequence[ShardEntry], window: int) -> None:
    """Raises DataError where a cache of so many bytes cannot hold two windows. limit: 0 = none; window: 0 = all."""
    sizes = sorted((entry.bytes for entry in entries), reverse=True)
    window = min(window, len(sizes)) or len(sizes)
    needed = sum(sizes[: 2 * window])
    if limit and needed > limit:
        fitting = max((w for w in range(1, len(sizes)) if sum(sizes[: 2 * w]) <= limit), default=0)
        rule = f"data.window={fitting}" if fitting else f"data.window=1 with data.cache_gb={_gb(sum(sizes[:2]))}"
        raise DataError(
            f"data.cache_gb = {limit / 1e9:g} is less than two windows of shards, {_gb(needed)} (a window is {window} "
            f"of {len(sizes)} shards): each would be fetched again and again; set data.cache_gb={_gb(needed)} or, in a "
            f"new run, {rule}"
        )


class ReadAhead:
    """Follows one loader through the epochs. Raises DataError: check_room.

    staged: the shards can be read where they lie. say: told how the first window comes. warn: of staged shards, told
    which cannot be, and why, each reason once; whoever reads one goes on without a word.
    """

    def __init__(self, cache: ShardCache, split: Split, order: Order, *, staged: bool = False):
        self.cache, self.split, self.order, self.staged = cache, split, order, staged
        self.say: Callable[[str], None] = lambda text: None
        self.warn: Callable[[str], None] = lambda text: None
        self._warned: set[str] = set()
        check_room(cache.limit, split.entries, order.window)
        self._prefetch: Prefetch | None = None
        self._start = (0, 0)  # epoch, window
        self._reached = 0  # shards from there

    def begin(self, epoch: int, index: int) -> None:
        """The loader starts, or starts again, at a place. Where that lies ahead, what is under way goes on."""
        place = (epoch, self.order.window_of(epoch, index))
        if self._prefetch is None or self._passed(*place) < self._reached:
            self.close()
            self._start = place
            ahead = 2 * self.order.window - 1
            self._prefetch = Prefetch(self.cache, self._shards(*place), ahead=ahead, failed=self._failed)
        self.at(epoch, index)

    def at(self, epoch: int, index: int) -> None:
        """The loader has come to a place."""
        if self._prefetch is not None:
            self._reached = self._passed(epoch, self.order.window_of(epoch, index))
            self._prefetch.advance(self._reached)

    def close(self) -> None:
        """Stop; `begin` begins again."""
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None
        self._reached = 0

    def _failed(self, error: Exception) -> None:
        if self.staged and str(error) not in self._warned:
            self._warned.add(str(error))
            self.warn(f"WARNING: not staged, but read where it lies: {error}")

    def _passed(self, epoch: int, window: int) -> int:
        """Shards between the start and a window."""
        windows = window - self._start[1]
        return (epoch - self._start[0]) * len(self.split.entries) + windows * self.order.window

    def _shards(self, epoch: int, window: int) -> Iterator[tuple[str, int | None, str]]:
        """Shards from a window on, without end, in the thread that fetches them: asked for the next, it has had one."""
        order = Order(self.split.shard_counts, seed=self.order.seed, window=self.order.window)  # keeps its own epoch
        entries = [self.split.entries[shard] for shard in order.shards_from(epoch, window)]
        told = time.monotonic()
        for number, entry in enumerate(entries[: order.window]):
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                total, done = (sum(e.bytes for e in entries[:n]) / 1e9 for n in (order.window, number))
                verb = "staging" if self.staged else "fetching"
                self.say(f"{verb} the first window: {number} of {len(entries[: order.window])} shards, {done:.3g} of "
                         f"{total:.3g} GB")  # fmt: skip
            yield entry.shard, entry.bytes, entry.sha256
        for entry in entries[order.window :]:
            yield entry.shard, entry.bytes, entry.sha256
        while True:
            epoch += 1
            for shard in order.shards_from(epoch, 0):
                entry = self.split.entries[shard]
                yield entry.shard, entry.bytes, entry.sha256


def _gb(size: int) -> str:
    """Bytes in 1e9, rounded up, so that as much is enough."""
    digits = 10.0 ** (math.floor(math.log10(max(size, 1))) - 2)
    return f"{math.ceil(size / digits) * digits / 1e9:.10g}"
