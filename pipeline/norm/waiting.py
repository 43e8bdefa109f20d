"""How long a rank stands in something: by the clock on a CPU, on a GPU by events of the stream that is held up.

Off, which is the default, it costs a comparison. On a GPU nothing waits for the device until `taken`.
"""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = tuple[float, Any]  # of a beginning: by the clock, or an event


class Waiting:
    """Seconds between `begin` and `end`, added up over all that were begun while it is on."""

    def __init__(self) -> None:
        self.on = False
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def begin(self, device: torch.device) -> Mark | None:
        """None while it is off."""
        if not self.on:
            return None
        if device.type != "cuda":
            return time.perf_counter(), None
        return 0.0, _recorded()

    def end(self, mark: Mark | None) -> None:
        if mark is None:
            return
        began, event = mark
        if event is None:
            self._seconds += time.perf_counter() - began
        else:
            self._events.append((event, _recorded()))

    def taken(self) -> float:
        """The seconds since the last call. Waits for the device where there are events."""
        seconds, events = self._seconds, self._events
        self._seconds, self._events = 0.0, []
        for first, last in events:
            last.synchronize()
            seconds += first.elapsed_time(last) / 1e3
        return seconds


def _recorded() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


STATISTICS = Waiting()  # in exchanges of batch statistics, forward and backward
