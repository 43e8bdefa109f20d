"""Reading samples by offset, in whatever order they are asked for, and checking that they are what was indexed."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable

from pipeline.data.dataset import Dataset
from pipeline.data.decode import DecodeError
from pipeline.data.remote import RangeIgnored
from pipeline.data.shards import payload_digest
from pipeline.data.split import Split


class ShardStream:
    """Image bytes of one split by sample number. Opens a shard at its first read and keeps the last `keep` open.

    A remote shard is fetched whole into the node's cache when its first sample is asked for; or, for a few samples of
    many shards (whole = False), no more of it than their bytes. One that the cache has evicted takes room on the disk
    for as long as it is open here.
    """

    def __init__(self, dataset: Dataset, split: Split, *, keep: int = 64, whole: bool = True):
        self.dataset, self.split, self.keep, self.whole = dataset, split, keep, whole
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> bytes:
        """Bytes of one image. Raises DecodeError if they are not what was indexed, DataError for a lost shard."""
        length, offset = int(self.split.length_S[sample]), int(self.split.offset_S[sample])
        shard = int(self.split.shard_S[sample])

        def read() -> bytes:
            return self._range(shard, offset, length) or os.pread(self._file(shard), length, offset)

        def read_original() -> bytes:
            with self.dataset.open_original(self.split.entries[shard]) as file:
                return os.pread(file.fileno(), length, offset)

        try:
            return self._checked(sample, length, read)
        except DecodeError:
            if not self.dataset.is_staged:
                raise
            return self._checked(sample, length, read_original)  # a disk may lose what was sound when it was copied

    def _checked(self, sample: int, length: int, read: Callable[[], bytes]) -> bytes:
        try:
            payload = read()
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from None
        if len(payload) != length:
            raise DecodeError(f"ends after {len(payload)} of {length} bytes")
        if payload_digest(payload) != self.split.digest(sample):
            raise DecodeError("its bytes are not those that were indexed")
        return payload

    def _range(self, shard: int, offset: int, length: int) -> bytes:
        """Bytes straight from the origin; none where they are to be had on this node, or from a whole shard only."""
        entry, cache = self.split.entries[shard], self.dataset.cache
        if self.whole or cache is None or cache.use(entry.shard, size=entry.bytes, sha256=entry.sha256):
            return b""
        try:
            return cache.origin.read_range(entry.shard, offset, length)
        except RangeIgnored:
            return b""

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        with self.dataset.open(self.split.entries[shard]) as file:
            self._files[shard] = os.dup(file.fileno())
        if len(self._files) > self.keep:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}  # files do not cross to a worker

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()
