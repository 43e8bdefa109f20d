"""Everything of a run that W&B's server lacks, sent once: segments whole where it has nothing of them, else by rows;
and artifacts, which no segment holds.

`wandb sync` alone neither remembers nor checks enough: it ends with 0 and marks a segment as sent when the server
refused every row, appends a segment again that was sent in part, and tries for ever where there is no network (0.31,
measured). So the server is asked before and after.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.callbacks.artifacts import FILES, Artifacts, Kept
from pipeline.callbacks.journal import read_journal
from pipeline.callbacks.segments import Segment, Values, position_of, segments, values
from pipeline.callbacks.wandb_reporter import send
from pipeline.callbacks.wandb_server import ServerError, WandbPlace, last_position_on_server, reason

_ANSWER_SECONDS, _SEEN_SECONDS = 20.0, 10.0  # for one question; until what was sent can be seen
_ORPHAN_SECONDS = 3.0  # W&B's own process, of another session, looks every 2 s whether the one that began it lives


class SyncError(Exception):
    """W&B does not have all of the run; the message says why, and what to do."""


def synchronize(
    directory: Path, place: WandbPlace, *, seconds: float, exit_code: int = 0, artifacts: Artifacts | None = None,
    dry_run: bool = False, say: Callable[[str], object] = print,
) -> int:  # fmt: skip
    """Send what is missing; returns how many rows that was. Raises SyncError.

    exit_code: of the run, if rows have to be sent singly. dry_run: only say what would be sent, and change nothing.
    """
    return _Sync(directory, place, seconds, exit_code, artifacts, dry_run, say).run()


class _Sync:
    def __init__(
        self, directory: Path, place: WandbPlace, seconds: float, exit_code: int, artifacts: Artifacts | None,
        dry_run: bool, say: Callable[[str], object],
    ):  # fmt: skip
        self.directory, self.place, self.exit_code, self.say = directory, place, exit_code, say
        self.artifacts, self.dry_run = artifacts, dry_run
        self.seconds, self.until = seconds, time.monotonic() + seconds
        path = directory / "metrics.csv"
        self.journal = [values(row) for row in read_journal(path)] if path.exists() else []
        self.known = -1  # how far the history on the server reaches

    def run(self) -> int:
        every = segments(self.directory, self.place.id)
        waiting = [each for each in every if each.is_offline and not each.marker.exists()]
        missing = self.artifacts.missing() if self.artifacts else []
        if not waiting and not missing and all(each.is_offline for each in every):
            self.say(f"{self.directory}: nothing to send, " + (
                f"{len(every)} segments were sent before" if every else "it has no W&B segments"))  # fmt: skip
            return 0
        try:
            self.known = self._first_asked(every)
            sent = sum(self._segment(each) for each in waiting)
            sent += self._rows([row for row in self.journal if position_of(row) > self.known], "lost or refused before")
            if missing:
                self._keep(missing)
        except ServerError as error:
            raise SyncError(f"{self.directory}: {error}; the same command goes on from there") from None
        if not sent and not missing:
            self.say(f"{self.directory}: nothing to send, W&B has every row")
        return sent

    def _first_asked(self, every: Sequence[Segment]) -> int:
        try:
            return self._asked()
        except ServerError as error:
            if not self.dry_run:
                raise
            sent = [position_of(row) for each in every if each.marker.exists() for row in each.rows()]
            self.say(f"{self.directory}: by what was marked as sent, for the server cannot be asked ({error})")
            return max(sent, default=-1)

    def _keep(self, missing: Sequence[Kept]) -> None:
        assert self.artifacts is not None
        if not self.dry_run:
            send(self.place, self.directory, [], exit_code=self.exit_code, seconds=self._left(),
                 artifacts=self.artifacts)  # fmt: skip
        size = sum(each.path.stat().st_size for each in missing)
        what = f"{size / 1e6:,.1f} MB" if self.artifacts.how == FILES else "their digests and places"
        self._tell(f"artifacts: {', '.join(each.key for each in missing)} ({what})")

    def _tell(self, what: str) -> None:
        self.say(f"would send {what}" if self.dry_run else what)

    def _segment(self, segment: Segment) -> int:
        rows, sent = segment.rows(), 0
        if rows:
            first, last = position_of(rows[0]), position_of(rows[-1])
            if first > self.known:
                between = [row for row in self.journal if self.known < position_of(row) < first]
                sent += self._rows(between, "missing before a segment") + self._upload(segment, rows)
            elif last > self.known:  # an online start, or a sync that was cut off, sent a part of it
                sent += self._rows([row for row in rows if position_of(row) > self.known], "the rest of a segment")
        if not self.dry_run:
            segment.marker.touch()
        return sent

    def _upload(self, segment: Segment, rows: Sequence[Values]) -> int:
        if self.dry_run:
            self.known = position_of(rows[-1])
        else:
            self._upload_now(segment, rows)
        self._tell(f"{segment.name}: {len(rows)} rows, to step {rows[-1]['step']}")
        return len(rows)

    def _upload_now(self, segment: Segment, rows: Sequence[Values]) -> None:
        try:
            complaint = _wandb_sync(segment, self.directory, self._left())
            if complaint and self._asked() < position_of(rows[-1]):  # else it is about the end that a kill cut off
                raise ServerError(complaint)
            self._confirm(rows)
        except ServerError:
            segment.marker.unlink(missing_ok=True)  # `wandb sync` makes it in any case
            raise

    def _rows(self, rows: Sequence[Values], what: str) -> int:
        if rows:
            if self.dry_run:
                self.known = position_of(rows[-1])
            else:
                send(self.place, self.directory, rows, exit_code=self.exit_code, seconds=self._left())
                self._confirm(rows)
            self._tell(f"metrics.csv: {len(rows)} rows, to step {rows[-1]['step']} ({what})")
        return len(rows)

    def _confirm(self, rows: Sequence[Values]) -> None:
        wanted, until = position_of(rows[-1]), time.monotonic() + min(_SEEN_SECONDS, self._left())
        while (there := self._asked()) < wanted:
            if time.monotonic() > until:
                raise ServerError(
                    f"W&B did not take all rows: it has them to step {max(there, 0) // 2} of {wanted // 2}"
                )
            time.sleep(0.5)
        self.known = there

    def _asked(self) -> int:
        return last_position_on_server(self.place, seconds=min(_ANSWER_SECONDS, self._left()))

    def _left(self) -> float:
        left = self.until - time.monotonic()
        if left <= 0:
            raise ServerError(f"not finished after --timeout {self.seconds:g} s")
        return left


def _wandb_sync(segment: Segment, directory: Path, seconds: float) -> str | None:
    """W&B's own upload of a segment, in a process that does not outlive its time; returns what it complains about."""
    command = [sys.executable, "-m", "wandb", "sync", str(segment.path.parent.resolve())]
    settings = {"WANDB_DIR": str(directory.resolve()), "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "false"}
    with tempfile.TemporaryFile("w+") as output:  # a pipe would be held open by a client process that stays behind
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**os.environ, **settings},
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ServerError(f"W&B did not take {segment.name} within {seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
                time.sleep(_ORPHAN_SECONDS)
        output.seek(0)
        lines = output.read().splitlines()
    complaint = next((line for line in lines if "ERROR" in line or line.startswith("Error:")), None)
    if code and not complaint:
        complaint = f"wandb sync ended with {code}"
    return reason(complaint).removeprefix("wandb: ERROR ") if complaint else None
