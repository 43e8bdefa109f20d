"""What a person hears of while a run trains, by alerts of its W&B run: a bad loss, a stall, low goodput, a crash loop.

An alert goes where each user of W&B has said, by mail or to Slack. It is sent beside the training, which never waits
for it, and only where the run is online: one that is sent with a later sync would tell of what is long over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pipeline.callbacks.journal import Row

TITLE_LENGTH, TEXT_LENGTH = 63, 2000  # the first is W&B's own bound
HOUR = 3600.0
SETTLING = HOUR  # seconds since the run first began in which goodput is no reason: its beginning weighs too much
WAIT, WAIT_GOODPUT = HOUR, 6 * HOUR  # between two alerts of one kind


class Send(Protocol):
    """Of one alert: level is INFO, WARN or ERROR, wait_seconds what W&B lets pass before the next of its title."""

    def __call__(self, title: str, text: str, *, level: str, wait_seconds: float) -> object: ...


class Alerts:
    """The alerts of a run, as a reporter of the leading rank: rows tell it of goodput, others of the rest.

    command: how the run goes on. began: seconds since 1970, when the run first began. goodput: the bound; 0 = none.
    """

    def __init__(
        self, send: Send, *, name: str, directory: Path, command: str, began: float, goodput: float,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.send, self.name, self.directory, self.command, self.clock = send, name, directory, command, clock
        self.began, self.goodput = began, goodput
        self._is_low = False
        self._sent: dict[str, float] = {}

    def bad_loss(self, text: str) -> None:
        """A loss that is no number, or a spike: the run ends, or goes back to its newest checkpoint."""
        self._tell("bad loss", text, "ERROR", WAIT)

    def stall(self, text: str) -> None:
        """A rank holds up all others. May be called by any thread, also while the training stands."""
        self._tell("stands still", text, "WARN", WAIT)

    def crash_loop(self, failed: int, step: int, allowed: int) -> None:
        """This start goes on where so many before it failed; after `allowed` of them the next one is refused."""
        self._tell(
            "crash loop",
            f"starts in a row that failed after step {step} and got no further: {failed}; after {allowed} of them "
            f"(run.stalled_starts) the next one is refused. Logs: {self.directory / 'logs'}",
            "ERROR", WAIT,
        )  # fmt: skip

    def append(self, row: Row) -> None:
        """Goodput is told of once, until it has been at the bound again."""
        if not self.goodput or row.goodput is None or row.at is None or row.at - self.began < SETTLING:
            return
        is_low = row.goodput < self.goodput
        if is_low and not self._is_low:
            is_low = self._tell(
                "low goodput",
                f"goodput is {row.goodput:.1%} at step {row.step}, below tracking.goodput_alert = {self.goodput:g}: so "
                "much of the time since the run began was in steps that count. `pipeline report` shows the rest",
                "WARN", WAIT_GOODPUT,
            )  # fmt: skip
        self._is_low = is_low

    def interrupted(self) -> None:
        """Nothing: that is no reason to get up."""

    def close(self) -> None:
        """Nothing: what is on its way is the tracker's to wait for."""

    def _tell(self, what: str, text: str, level: str, wait_seconds: float) -> bool:
        """Whether it was time for another one of its kind."""
        now = self.clock()
        if now - self._sent.get(what, -wait_seconds) < wait_seconds:  # W&B counts, too, over all starts
            return False
        self._sent[what] = now
        text = f"{text[:TEXT_LENGTH]}\nrun directory: {self.directory}\ngo on with: {self.command}"
        # The name in front: W&B's waiting goes by title.
        room = TITLE_LENGTH - len(what) - 2
        self.send(f"{self.name[:room]}: {what}", text, level=level, wait_seconds=wait_seconds)
        return True
