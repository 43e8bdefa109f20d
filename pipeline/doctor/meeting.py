"""Ranks that tell each other what they see, over one TCP store: neither NCCL nor gloo has to work for that.

Whatever is waited for has a time, and who has not come is known by then. What travels is JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.launch.patience import within
from pipeline.world import World

_POLL_SECONDS = 0.02  # between two looks: a wait inside of the store would keep Ctrl-C waiting, too
_PREFIX = "doctor"


class LostError(Exception):
    """Rank 0, which holds the store, does not answer. gone: it did, and does not any more."""

    def __init__(self, message: str, *, gone: bool = False):
        super().__init__(message)
        self.gone = gone


class Meeting:
    """This rank's place among the others. Raises LostError where rank 0 does not answer within the time."""

    def __init__(self, world: World, host: str, port: int, seconds: float):
        self.world, self.host, self.port = world, host, port
        # torchrun's agent holds a store already, under the same address.
        self._store = self.connected(seconds, holds=world.leads and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"))

    def connected(self, seconds: float, *, holds: bool = False) -> TCPStore:
        """One more connection, for a thread of its own. Raises LostError."""
        limit = timedelta(seconds=seconds)
        try:
            return within(
                seconds + 1,
                lambda: TCPStore(self.host, self.port, is_master=holds, timeout=limit, wait_for_workers=False),
            )
        except (TimeoutError, RuntimeError, OSError) as error:
            what = "cannot listen" if holds else "does not answer"
            said = (str(error).splitlines() or ["no more is known"])[0][:200]
            raise LostError(f"rank 0 {what} at {self.host}:{self.port} ({said})") from None

    def say(self, what: str, content: object) -> None:
        """For all others. Raises LostError."""
        self._asked("set", f"{_PREFIX}/{what}/{self.world.rank}", json.dumps(content))

    def hear(self, what: str, seconds: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """What ranks have said by the end of the time, or as soon as all have. ranks: None = all. Raises LostError."""
        waited = list(range(self.world.size) if ranks is None else ranks)
        heard: dict[int, Any] = {}
        until = time.monotonic() + seconds
        while True:
            for rank in [rank for rank in waited if rank not in heard]:
                key = f"{_PREFIX}/{what}/{rank}"
                if self._asked("check", [key]):
                    heard[rank] = json.loads(self._asked("get", key))
            if len(heard) == len(waited) or time.monotonic() > until:
                return heard
            time.sleep(_POLL_SECONDS)

    def _asked(self, what: str, *arguments: object) -> Any:
        try:
            return getattr(self._store, what)(*arguments)
        except RuntimeError as error:  # DistNetworkError is one
            said = (str(error).splitlines() or ["no more is known"])[0][:200]
            raise LostError(f"rank 0 at {self.host}:{self.port} has gone ({said})", gone=True) from None
