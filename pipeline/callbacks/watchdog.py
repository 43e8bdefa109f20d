"""A thread in every rank that notices when the run stands still, names who holds it up, and ends all ranks.

Each second a rank tells the rendezvous store where it stands; the leading one reads them all and judges
(suspicion.py), the others hear its verdict. None of it is seen by the training, which only moves its pulse.
The store is served by a thread of C++, so it answers while a process is stuck.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any

import lightning
import torch
import torch.distributed as dist

from pipeline.callbacks.suspicion import BROKEN, FAILED, Report, Suspicion, in_collective, limit, suspects
from pipeline.launch.failure import AGAIN, FailedRunError, NameSamples, leave_verdict, where_in_run
from pipeline.launch.heartbeat import Heartbeat
from pipeline.launch.pulse import Place, Pulse

TICK = 1.0  # seconds between two looks
LOCKED = 3600.0  # by the clock of the machine: a process that is stopped for less goes on when it is let
GIVE_UP = 10.0  # without the store, before the rank that serves it counts as gone
BROKEN_PATIENCE = 4.0  # silence that names a rank once a connection to somebody has broken
# A rank is named when it exceeds its limit and ended when it does so by this factor: reading from a network may
# stand for minutes and come back (data/remote.py tries for that long), computing does not.
ENDED, ENDED_READING = 1.5, 4.5
_READING = ("loading", "checkpoint", "start")
_VERDICT, _HEARD = "watchdog/verdict", "watchdog/heard"


class Watchdog(lightning.Callback):
    """Moves the pulse, and watches it. hang_seconds: without a move, beyond which a rank is named; 0 = never.

    first_seconds: the same for what has not been done twice yet. hint: how to go on. logs: for stacks and reports.
    tell: called once with who holds up the run; must return at once.
    heartbeat: renewed while this rank stands nowhere for longer than is allowed; with hang_seconds = 0, while it runs.
    """

    def __init__(
        self,
        pulse: Pulse,
        *,
        rank: int,
        world: int,
        host: str,
        hang_seconds: float,
        first_seconds: float,
        logs: Path,
        name: NameSamples,
        hint: str = "",
        say: Callable[[str], None] = print,
        tell: Callable[[str], object] = lambda text: None,
        heartbeat: Heartbeat | None = None,
    ):
        self.tell = tell
        self.heartbeat = heartbeat
        self.pulse, self.rank, self.world, self.host, self.name = pulse, rank, world, host, name
        self.hang_seconds, self.first_seconds, self.logs, self.hint, self.say = (
            hang_seconds, first_seconds, logs, hint, say)  # fmt: skip
        self._trouble = ""
        self._age, self._age_moves, self._clock = 0.0, -1, 0.0
        self._heard: dict[int, tuple[int, float]] = {}
        self._last: dict[int, Report] = {}
        self._named: tuple[int, ...] = ()
        self._store: Any = None
        self._store_seen, self._all_there, self._beat = 0.0, False, 0
        self._stop = threading.Event()
        self._main = threading.main_thread().ident
        self._thread: threading.Thread | None = None
        self._log: IO[str] | None = None
        self._fatal = False

    # --- the training, seen from its hooks ---

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage != "fit" or self._thread is not None:
            return
        first = next((p for p in pl_module.parameters() if p.requires_grad), None)
        if first is not None:  # the last to get its gradient: from there on a rank waits for the others
            first.register_post_accumulate_grad_hook(self._gradients_are_there)  # type: ignore[no-untyped-call]
        if not self.hang_seconds:
            if self.heartbeat is not None:
                self._begin(self._beat_alone)
            return
        if self.world > 1:
            self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own
            self._store.set_timeout(timedelta(seconds=5))
        self.logs.mkdir(parents=True, exist_ok=True)
        self._log = (self.logs / f"rank-{self.rank}.log").open("a")
        self._fatal = not faulthandler.is_enabled()
        if self._fatal:
            faulthandler.enable(self._log)  # where it stood when it dies of itself
        self._begin(self._watch)

    def _begin(self, work: Callable[[], None]) -> None:
        if self.heartbeat is not None:
            self.heartbeat.renew()
        self._thread = threading.Thread(target=work, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.pulse.move("loading", trainer.global_step + 1, trainer.current_epoch, batches)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.pulse.move("forward", trainer.global_step + 1, trainer.current_epoch, batch_idx)

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        self.pulse.move("backward")

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Any
    ) -> None:
        self.pulse.move("optimizer")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.pulse.move("statistics")
        else:
            self.pulse.move("loading", trainer.global_step + 1, trainer.current_epoch, batch_idx + 1)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.pulse.move("loading", trainer.global_step + 1, trainer.current_epoch, batches)

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        self.pulse.move("validation")

    def _gradients_are_there(self, parameter: torch.Tensor) -> None:
        if self.pulse.place.phase == "backward":
            self.pulse.move("gradients")

    def stop(self, *, failed: bool = False) -> None:
        """The training is over. failed: for a reason of this rank's own, which the others may not know."""
        if self._thread is None:
            return
        if failed:
            self._trouble = FAILED
        else:
            self.pulse.move("end")
        self._stop.set()
        self._thread.join()
        self._thread = None
        if self.heartbeat is not None:
            self.heartbeat.end()
        if self._log is None:
            return
        if self._store is not None:
            with suppress(Exception):  # who served it may be gone already
                self._tell(self._report(self.pulse.place))
        faulthandler.cancel_dump_traceback_later()
        if self._fatal:
            faulthandler.disable()
        self._log.close()

    def lost(self, error: Exception) -> FailedRunError:
        """What to say of a collective that failed: whose end it was, if the watch finds one that is gone."""
        self._trouble = BROKEN
        if self._thread is not None and self.world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once, and waits half a minute
            time.sleep(GIVE_UP + BROKEN_PATIENCE)  # the thread ends this process as soon as it knows
        first = str(error).strip().splitlines()[0]
        return FailedRunError(f"the connection between ranks broke, though none is known to be gone: {first}",
                              code=AGAIN, shared=True)  # fmt: skip

    # --- the thread ---

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(TICK):
            now = time.monotonic()
            # A machine that slept, or a stopped process, has not been standing: a look counts as three ticks at most.
            self._look(min(now - before, 3 * TICK))
            before = now

    def _beat_alone(self) -> None:
        assert self.heartbeat is not None
        while not self._stop.wait(TICK):
            self.heartbeat.renew()

    def _look(self, seconds: float) -> None:
        self._clock += seconds
        place = self.pulse.place
        self._age = self._age + seconds if place.moves == self._age_moves else 0.0
        self._age_moves = place.moves
        mine = self._report(place)
        if self.heartbeat is not None and self._age <= mine.limit:
            self.heartbeat.renew()
        # Where this thread itself cannot run any more, code in C that keeps Python's lock: end without it.
        assert self._log is not None
        faulthandler.dump_traceback_later(max(2 * mine.limit, LOCKED) if place.phase != "end" else 1e6,
                                          exit=True, file=self._log)  # fmt: skip
        if self._store is None:
            self._judge([mine], {})
            return
        try:
            self._tell_and_hear(mine)
        except Exception:  # the store has many ways to be away
            if self._clock - self._store_seen > (BROKEN_PATIENCE if self._trouble == BROKEN else GIVE_UP):
                self._without_store(mine)
            return
        self._store_seen = self._clock

    def _report(self, place: Place) -> Report:
        pulse = self.pulse
        allowed = limit(place.phase, seen=pulse.seen[place.phase], longest=pulse.longest[place.phase],
                        hang_seconds=self.hang_seconds, first_seconds=self.first_seconds)  # fmt: skip
        waiting, where = _standing(self._main, place.phase)
        return Report(self.rank, self.host, place.phase, place.step, place.epoch, place.number, self._age, allowed,
                      waiting, where, self._trouble)  # fmt: skip

    def _tell(self, mine: Report) -> None:
        assert self._store is not None
        self._beat += 1
        self._store.set(f"watchdog/{self.rank}", json.dumps([self._beat, asdict(mine)]))

    def _tell_and_hear(self, mine: Report) -> None:
        self._tell(mine)
        assert self._store is not None
        if self._store.check([_VERDICT]):
            verdict = json.loads(self._store.get(_VERDICT))
            self._store.add(_HEARD, 1)
            self._end(verdict)
        judge = 0 if self.rank != 1 else 1  # the second rank watches the first one
        if self.rank > 1:
            return
        ranks = range(self.world) if judge == 0 else [0]
        names = [f"watchdog/{rank}" for rank in ranks]
        self._all_there = self._all_there or self._store.check(names)
        if not self._all_there:
            return
        broken = False
        for rank, text in zip(ranks, self._store.multi_get(names), strict=True):
            beat, content = json.loads(text)
            self._last[rank] = Report(**content)
            broken |= self._last[rank].trouble == BROKEN
            if self._heard.get(rank, (0, 0.0))[0] != beat:
                self._heard[rank] = beat, self._clock
        silent = {rank: self._clock - heard for rank, (_, heard) in self._heard.items() if rank != self.rank}
        if judge == 1:
            if silent[0] > self.hang_seconds * ENDED:
                self._judge([self._last[0], mine], silent)
            return
        self._judge([*self._last.values()], silent, broken=broken or self._trouble == BROKEN)

    def _judge(self, reports: list[Report], silent: dict[int, float], *, broken: bool = False) -> None:
        suspicion = suspects(reports, silent, patience=BROKEN_PATIENCE if broken else self.hang_seconds)
        if suspicion is None or suspicion.excess <= 1:
            self._named = () if suspicion is None else self._named
            return
        ranks = tuple(report.rank for report in suspicion.reports)
        ended = ENDED_READING if any(report.phase in _READING for report in suspicion.reports) else ENDED
        text = self._describe(suspicion)
        at_once = suspicion.reason == "failed" or (suspicion.reason == "silent" and broken)
        if at_once or suspicion.excess > ended:
            self._pronounce(text, suspicion)
        elif ranks != self._named:
            self._named = ranks
            self.tell(f"{text}; if it does not go on, all ranks end")
            self.say(f"WARNING: {text}; if it does not go on, all ranks end")

    def _without_store(self, mine: Report) -> None:
        if mine.phase == "end":
            return
        text = "rank 0, which serves the rendezvous, is gone"
        if 0 in self._last:
            text += f"; it was on {self._last[0].host}"
        failure = {"message": f"{text}; rank {self.rank} on {self.host} was {self._position(mine)}", "code": AGAIN}
        self._note(failure, [mine])
        self._end(failure, speaks=self.rank == 1)

    def _describe(self, suspicion: Suspicion) -> str:
        parts = [f"rank {report.rank} of {self.world} on {report.host} {self._verb(report, suspicion.reason)} "
                 f"{self._position(report)}{f', at {report.where}' if report.where else ''}"
                 for report in suspicion.reports[:4]]  # fmt: skip
        more = len(suspicion.reports) - len(parts)
        parts += [f"and {more} more ranks"] if more > 0 else []
        text = "; ".join(parts)
        if suspicion.reason == "meet":
            text += "; all ranks wait in collectives that do not meet"
        return text

    def _verb(self, report: Report, reason: str) -> str:
        if reason == "failed":
            return "failed (its log says why)"
        if reason == "silent":
            return f"gives no sign of life for {self._clock - self._heard[report.rank][1]:.0f} s: dead, or stuck"
        return f"has stood still for {report.age:.0f} s"

    def _position(self, report: Report) -> str:
        return where_in_run(Place(0, report.phase, report.step, report.epoch, report.number), self.name, report.rank)

    def _pronounce(self, text: str, suspicion: Suspicion) -> None:
        failure = {"message": text, "code": AGAIN}
        self._note(failure, list(suspicion.reports))
        if self._store is not None:
            self._store.set(_VERDICT, json.dumps(failure))
            until = time.monotonic() + 3 * TICK
            while time.monotonic() < until and self._store.add(_HEARD, 0) < self.world - 1:
                time.sleep(0.1)
        self._end(failure, speaks=True)

    def _note(self, failure: dict[str, Any], reports: list[Report]) -> None:
        """With all sample keys, of which the line shows the first."""
        ranks = [{**asdict(report), "keys": self.name(report.rank, report.epoch, report.number)} for report in reports]
        note_failure(self.logs, {**failure, "ranks": ranks})

    def _end(self, failure: dict[str, Any], *, speaks: bool = False) -> None:
        """End this process from its thread: the main one may never come back."""
        if self._stop.is_set():
            return
        assert self._log is not None
        self._log.write(f"pipeline: {failure['message']}; where this rank stood:\n")
        self._log.flush()
        faulthandler.dump_traceback(self._log, all_threads=True)
        said = leave_verdict(FailedRunError(failure["message"], code=failure["code"]))
        if speaks and not said:
            end = f"; {self.hint}" if self.hint else ""
            os.write(2, f"\npipeline: {failure['message']}{end}\n".encode())
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # the cursor, which a progress bar hides
        os._exit(failure["code"])


def note_failure(logs: Path, content: dict[str, Any]) -> None:
    """A line in logs/failures.jsonl, if it can be written: what it tells is on the terminal, too."""
    line = json.dumps({"at": datetime.now(tz=UTC).isoformat(timespec="seconds"), **content})
    with suppress(OSError):
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "failures.jsonl").open("a") as file:
            file.write(line + "\n")


def note_traceback(logs: Path, rank: int, error: BaseException) -> Path:
    """The whole story of an error whose line is said on the terminal; returns the log, which a full disk may lack."""
    log = logs / f"rank-{rank}.log"
    with suppress(OSError):
        logs.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            traceback.print_exception(error, file=file)
    return log


def connection_broke(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, by torch's types and gloo's words."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
             "Socket closed", "gloo/transport", "NCCL error", "Timed out waiting")  # fmt: skip
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _standing(thread: int | None, phase: str) -> tuple[bool, str]:
    """Whether the training waits in a collective, and the line where it stands."""
    frames = sys._current_frames()
    stack = _stack(frames.get(thread or 0))
    seen = [(frame.f_code.co_filename, frame.f_code.co_name) for frame in stack]
    waiting = in_collective(seen, phase)
    if seen and seen[-1][1] == "_engine_run_backward":  # on CUDA a thread of autograd's runs the backward
        others = [_stack(frame) for number, frame in frames.items() if number not in (thread, threading.get_ident())]
        waiting |= any(in_collective([(f.f_code.co_filename, f.f_code.co_name) for f in o], "") for o in others)
    if not stack:
        return waiting, ""
    text = _line(stack[-1])
    ours = next((frame for frame in reversed(stack) if "/pipeline/" in frame.f_code.co_filename), stack[-1])
    return waiting, text if ours is stack[-1] else f"{text}, called from {_line(ours)}"


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Outermost first."""
    found: list[FrameType] = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found[::-1]


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"
