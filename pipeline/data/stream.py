"""Reading samples of local shards by offset, in whatever order they are asked for."""

from __future__ import annotations

import os
from collections import OrderedDict

from pipeline.data.shards import DataError, Split

_OPEN_SHARDS = 64


class ShardStream:
    """Image bytes of one split by sample number. Opens a shard at its first read and keeps the last 64 open."""

    def __init__(self, split: Split):
        self.split = split
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> bytes:
        """Bytes of one image. Raises DataError naming shard and key if fewer are there."""
        shard, length = int(self.split.shard_S[sample]), int(self.split.length_S[sample])
        payload = os.pread(self._file(shard), length, int(self.split.offset_S[sample]))
        if len(payload) != length:
            raise DataError(
                f"{self.split.shards[shard]}: sample {self.split.key[sample]} ends after {len(payload)} of {length} "
                f"bytes; run `pipeline shards verify {self.split.shards[shard].parent}`"
            )
        return payload

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            self._files[shard] = os.open(self.split.shards[shard], os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.split.shards[shard]}: {error.strerror}; it was there at the start") from None
        if len(self._files) > _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return {"split": self.split, "_files": OrderedDict()}  # descriptors do not cross to a worker

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
