"""Shards brought into a cache before they are needed, in the order of their needs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipeline.data.cache import ShardCache
from pipeline.data.remote import Stopped


class Wanted(NamedTuple):
    """A shard that a consumer needs, now or soon. number: in the order of its needs."""

    number: int
    name: str
    size: int | None
    sha256: str


class Prefetch:
    """A thread that brings shards into the cache before they are needed, at most `ahead` beyond the consumer.

    With what the consumer needs now it takes at most the cache's limit, and what it has brought counts as used until
    the consumer is past it: what is evicted for a shard is none that is still to be read. Several ranks of a node may
    prefetch the same shards: what one downloads the others pass over. A shard that could not be had is kept in
    `errors`, told to `failed`, and left to the consumer's own fetch, which tries again and raises. A copy in another
    process rests.
    """

    def __init__(
        self,
        cache: ShardCache,
        shards: Iterable[tuple[str, int | None, str]],
        *,
        ahead: int,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """shards: name, size and sha256 in the order in which they will be needed; may be endless."""
        self.cache, self.ahead, self._failed = cache, ahead, failed
        self.errors: deque[Exception] = deque(maxlen=16)
        self._position = 0
        self._ended = threading.Event()
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(shards,), name="pipeline-prefetch", daemon=True)
        self._thread.start()

    def advance(self, position: int) -> None:
        """The consumer now needs shards[position]."""
        with self._moved:
            self._position = max(self._position, position)
            self._moved.notify_all()

    def close(self) -> None:
        """Stop; a download that is under way stops too and leaves its partial."""
        self._ended.set()
        with self._moved:
            self._moved.notify_all()
        self._thread.join(timeout=5)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _resting, (self.cache, self.ahead)

    def _run(self, shards: Iterable[tuple[str, int | None, str]]) -> None:
        window: deque[Wanted] = deque()
        try:
            for number, (name, size, sha256) in enumerate(shards):
                if not self._due(Wanted(number, name, size, sha256), window):
                    return
                if number < self._position:
                    continue
                try:
                    for wanted in window:
                        self.cache.use(wanted.name, size=wanted.size, sha256=wanted.sha256)
                    self.cache.fetch_if_idle(name, size=size, sha256=sha256, stop=self._ended)
                except Stopped:
                    return
                except Exception as error:
                    self.errors.append(error)
                    self._failed(error)
        except Exception as error:  # of the order itself
            self.errors.append(error)

    def _due(self, next_one: Wanted, window: deque[Wanted]) -> bool:
        """Wait for the consumer to come close enough; False once closed. window: what is wanted by now."""
        number = next_one.number
        with self._moved:
            while not self._ended.is_set():
                while window and window[0].number < self._position:
                    window.popleft()
                total = sum(wanted.size or 0 for wanted in (*window, next_one))
                room = not self.cache.limit or total <= self.cache.limit
                if number <= self._position + self.ahead and (room or number <= self._position):
                    window.append(next_one)
                    return True
                self._moved.wait()
        return False


def _resting(cache: ShardCache, ahead: int) -> Prefetch:
    return Prefetch(cache, (), ahead=ahead)
