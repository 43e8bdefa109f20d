"""Remote shards brought into the node's cache before the order comes to them: this window's and the next."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.data.cache import Prefetch, ShardCache
from pipeline.data.order import Order
from pipeline.data.shards import DataError
from pipeline.data.split import Split


class ReadAhead:
    """Follows one loader through the epochs. Raises DataError where the cache cannot hold two windows."""

    def __init__(self, cache: ShardCache, split: Split, order: Order):
        self.cache, self.split, self.order = cache, split, order
        self._prefetch: Prefetch | None = None
        self._start = (0, 0)  # epoch, window
        sizes = sorted((entry.bytes for entry in split.entries), reverse=True)
        needed = sum(sizes[: 2 * order.window])
        if cache.limit and needed > cache.limit:
            fitting = max((w for w in range(1, len(sizes)) if sum(sizes[: 2 * w]) <= cache.limit), default=0)
            rule = (
                f"data.window={fitting}" if fitting else f"data.cache_gb={sum(sizes[:2]) / 1e9:.3g} and data.window=1"
            )
            raise DataError(
                f"data.cache_gb = {cache.limit / 1e9:g} is less than two windows of shards, {needed / 1e9:.3g} (a "
                f"window is {order.window} of {len(sizes)} shards): each would be fetched again and again; set {rule}"
            )

    def begin(self, epoch: int, index: int) -> None:
        """The loader starts, or starts again, at a place."""
        self.close()
        self._start = (epoch, self.order.window_of(epoch, index))
        self._prefetch = Prefetch(self.cache, self._shards(), ahead=2 * self.order.window)

    def at(self, epoch: int, index: int) -> None:
        """The loader has come to a place."""
        if self._prefetch is not None:
            shards = len(self.split.entries)
            first_epoch, first_window = self._start
            passed = (epoch - first_epoch) * shards + self.order.window_of(epoch, index) * self.order.window
            self._prefetch.advance(passed - first_window * self.order.window)

    def close(self) -> None:
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def _shards(self) -> Iterator[tuple[str, int | None, str]]:
        epoch, window = self._start
        while True:
            for shard in self.order.shards_from(epoch, window):
                entry = self.split.entries[shard]
                yield entry.shard, entry.bytes, entry.sha256
            epoch, window = epoch + 1, 0
