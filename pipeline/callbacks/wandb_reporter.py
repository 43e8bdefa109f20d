"""A run's rows in Weights & Biases, through its own client: one W&B run over all starts, without gaps or repeats.

W&B holds the beginning of the journal, up to some row. Each start finds out which one, from the server or from the
segments on disk, sends the rows of the journal behind it that a kill lost, and leaves out those that W&B has already,
also from steps that are trained anew. Nothing that W&B's server does or leaves undone stops or slows the training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb

from pipeline.callbacks.artifacts import FILES, Artifacts
from pipeline.callbacks.journal import Row, read_journal
from pipeline.callbacks.segments import Values, last_position, position, position_of, values
from pipeline.callbacks.wandb_server import (
    ServerError,
    WandbPlace,
    asked,
    last_position_on_server,
    quiet,
    reason,
    wandb_mode,
)
from pipeline.launch.patience import within

FAILED = 1
RESUMABLE = 75  # the exit code by which W&B knows a preempted run from a failed one
INIT_SECONDS, FINISH_SECONDS = 30.0, 20.0  # as long as a server may keep a run from starting and from ending
ALERT_SECONDS = 5.0  # for the server to take an alert
HASTE_SECONDS, UPLOAD_SECONDS = 10.0, 600.0  # for artifacts at the end of a start: interrupted or by name; as files
FLUSH_SECONDS = 1.0  # between writes of the segment: what SIGKILL may cost. W&B's own 15 s lost 40 rows of 40

# As the client's run.alert asks, but not through its process: that takes alerts, rows and the end of a run one after
# another, and towards a server that answers an alert with 500 it kept a run from ending for more than ten minutes.
_ALERT = """mutation NotifyScriptableRunAlert($entityName: String!, $projectName: String!, $runName: String!,
    $title: String!, $text: String!, $severity: AlertSeverity = INFO, $waitDuration: Duration) {
  notifyScriptableRunAlert(input: {entityName: $entityName, projectName: $projectName, runName: $runName,
      title: $title, text: $text, severity: $severity, waitDuration: $waitDuration}) { success }
}"""


class TrackingError(Exception):
    """W&B cannot be had as asked for."""


class WandbReporter:
    """One W&B run. Steps are our own metric; W&B's _step is `position`, by which its server and client drop repeats."""

    def __init__(
        self, place: WandbPlace, *, directory: Path, mode: str, config: dict[str, Any],
        journal: Path | None = None, artifacts: Artifacts | None = None, say: Callable[[str], object] = print,
        stop: Callable[[], None] | None = None,
    ):  # fmt: skip
        """Begin, or go on. directory: the run's. journal: its rows, up to the step from which the run goes on.

        artifacts: what W&B is to keep beside the rows; of an offline start `pipeline sync` sends them.
        stop: called where W&B wants the run to end; without it its client sends a SIGINT.
        """
        self.stop, self.artifacts = stop, artifacts
        self.place, self.directory, self.config, self.journal, self.say = place, directory, config, journal, say
        self.mode = wandb_mode(mode)
        self._exit_code, self._sent = 0, -1
        self._run: Any = None
        self._clients = 0
        self._seen: Values = {}
        self._alerts: list[threading.Thread] = []
        self._open(mode)
        if self.artifacts and self._run is not None and self.mode == "online":
            self.artifacts.begin(self._run)

    def append(self, row: Row) -> None:
        self._surely(lambda: self._log(row))

    def look(self, figures: Mapping[str, Any]) -> None:
        """What was seen in the network, by names beside those of metrics.py; it goes with the next row.

        A histogram is a dict as W&B keeps it: _type, values, bins. What a kill takes with its row is in the csv alone.
        """
        self._seen |= figures

    def alert(self, title: str, text: str, *, level: str, wait_seconds: float) -> None:
        """Have W&B tell its users, if the run is online. For any thread; returns at once, and fails without a word.

        level: INFO, WARN or ERROR. wait_seconds: that W&B lets pass before the next one of this title.
        """
        run = self._run
        if run is None or self.mode != "online":
            return

        def send() -> None:
            with contextlib.suppress(Exception):
                variables = {"entityName": run.entity, "projectName": run.project, "runName": run.id, "title": title,
                             "text": text, "severity": level, "waitDuration": round(wait_seconds * 1000)}  # fmt: skip
                asked("NotifyScriptableRunAlert", _ALERT, variables, seconds=ALERT_SECONDS)

        with contextlib.suppress(RuntimeError):  # no more threads for this process
            thread = threading.Thread(target=send, name="alert", daemon=True)
            thread.start()
            self._alerts.append(thread)

    def interrupted(self) -> None:
        self._exit_code = RESUMABLE
        if not self.place.returns:
            self._surely(lambda: self._run.mark_preempting())  # noqa: PLW0108  of the client that there is by then

    def failed(self) -> None:
        """The run is about to end by an error: in W&B it is failed, not finished, whatever was said before."""
        self._exit_code = FAILED

    def close(self) -> None:
        try:
            self._keep_artifacts()
        except BaseException:  # a signal: this process is to end now, and W&B's own would go on for hours
            _finish_soon(self._run, RESUMABLE, HASTE_SECONDS)
            self._run = None
            raise
        is_there = self._run is not None
        self._surely(lambda: self._run.finish(exit_code=self._exit_code))
        if is_there and self.mode == "online":
            self._compare()
        until = time.monotonic() + ALERT_SECONDS  # of one that the end followed at once
        for thread in self._alerts:
            thread.join(max(until - time.monotonic(), 0.0))

    def _keep_artifacts(self) -> None:
        """Not of a start that failed: others wait for its end, and the next one, or `pipeline sync`, sends them."""
        if not self.artifacts or self._run is None or self.mode != "online" or self._exit_code == FAILED:
            return
        in_haste = self._exit_code == RESUMABLE
        seconds = UPLOAD_SECONDS if self.artifacts.how == FILES and not in_haste else HASTE_SECONDS
        complaint = self.artifacts.end(self._run, seconds, in_haste=in_haste)
        if complaint:
            self.say(f"W&B has not confirmed every checkpoint ({reason(complaint)}); send the rest with: "
                     f"pipeline sync {self.directory}")  # fmt: skip
            _finish_soon(self._run, self._exit_code, HASTE_SECONDS)
            self._run = None

    def _log(self, row: Row) -> None:
        at = position(row.step, row.split)
        if at > self._sent:
            self._run.log(_logged(values(row) | self._seen), step=at, commit=True)
            self._sent = at
        self._seen = {}

    def _surely(self, action: Callable[[], object]) -> None:
        """Do it, if need be with a new client: a signal to all processes of a job ends W&B's own, too."""
        while self._run is not None:
            try:
                action()
                return
            except Exception as error:
                if self._clients > 1:
                    self._give_up("is left out from here on", error)
                    return
            self._run = None
            _end_client()
            self._open(self.mode)

    def _open(self, wanted: str) -> None:
        self._clients += 1
        try:
            self._run = self._begun(self.config, wanted)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            self._sent = self._position()
            for row in read_journal(self.journal) if self.journal and self.journal.exists() else ():
                self._log(row)
        except TrackingError:
            raise
        except Exception as error:  # a full disk, a broken client: the run goes on without
            self._give_up("cannot be had", error)

    def _begun(self, config: dict[str, Any], wanted: str) -> Any:
        try:
            return self._client(self.mode, config)
        except Exception as error:
            if wanted == "online" and self._clients == 1 and isinstance(error, wandb.errors.UsageError):
                raise TrackingError(f"{reason(error)}; set WANDB_API_KEY, or choose tracking.mode=offline") from None
            if self.mode != "online":
                raise
            self.mode = f"offline ({reason(error)})"
        # The client would refuse the id, as that of the run that did not begin: "run ID ... is in use".
        _end_client()
        return self._client("offline", config)

    def _client(self, mode: str, config: dict[str, Any]) -> Any:
        return _begin(self.place, self.directory, mode, config, INIT_SECONDS, FINISH_SECONDS, self.stop)

    def _position(self) -> int:
        """The position up to which W&B has the journal, -1 for nothing."""
        if self.mode == "online":
            return int(self._run.starting_step) - 1
        try:
            return last_position(self.directory, self.place.id)
        except Exception as error:  # an unreadable file: rows are sent twice rather than never
            self.say(f"W&B: earlier segments in {self.directory / 'wandb'} cannot be read ({reason(error)})")
            return -1

    def _compare(self) -> None:
        """Say so if the server has less than it was sent: the client tells of a timeout, and of a refusal nothing."""
        there: int | None = None
        until = time.monotonic() + 3
        while there is None or (there < self._sent and time.monotonic() < until):
            try:
                there = last_position_on_server(self.place, seconds=3)
            except ServerError:
                break
            if there < self._sent:
                time.sleep(0.3)  # what was taken may take a moment to be seen
        if there is None or there < self._sent:
            known = "" if there is None else f", up to step {max(there, 0) // 2} of {self._sent // 2}"
            self.say(f"W&B has not confirmed all rows{known}; send the rest with: pipeline sync {self.directory}")

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        self.say(f"W&B {what} ({reason(error)}); metrics.csv has every row, and: pipeline sync {self.directory}")


def _begin(
    place: WandbPlace, directory: Path, mode: str, config: dict[str, Any] | None,
    init_seconds: float, finish_seconds: float, stop: Callable[[], None] | None = None,
) -> Any:  # fmt: skip
    """W&B's own run. Raises one of its many errors."""
    quiet()
    # Its client writes a log into the run's directory. Where that cannot be written, logging itself would print a
    # traceback for every line of it.
    logging.raiseExceptions = False
    code = (config or {}).get("code", {})
    return wandb.init(
        id=place.id, name=place.name, project=place.project, entity=place.entity, group=place.group,
        tags=list(place.tags), dir=str(directory.resolve()), config=config, resume="allow",
        mode=mode,  # type: ignore[arg-type]
        settings=wandb.Settings(
            init_timeout=init_seconds, finish_timeout=finish_seconds, console="off",
            x_transaction_log_flush_interval=FLUSH_SECONDS, sweep_id=place.sweep,
            stop_fn=stop,
            # W&B itself would look into the repository of the working directory, whose remote may hold a token.
            disable_git=True, disable_code=True, git_commit=code.get("commit"), git_remote_url=code.get("remote"),
        ),
    )  # fmt: skip


def send(
    place: WandbPlace, directory: Path, rows: Iterable[Values], *, exit_code: int, seconds: float,
    artifacts: Artifacts | None = None,
) -> None:  # fmt: skip
    """Rows into the W&B run on the server, behind those that it has, and artifacts. Raises ServerError."""
    until = time.monotonic() + seconds
    try:
        run = _begin(place, directory, "online", None, seconds, seconds)
        for row in rows:
            if position_of(row) >= run.starting_step:
                run.log(_logged(row), step=position_of(row), commit=True)
        complaint = artifacts.end(run, max(until - time.monotonic(), 1.0)) if artifacts else ""
        if complaint:
            _finish_soon(run, exit_code, HASTE_SECONDS)
        else:
            run.finish(exit_code=exit_code)
    except Exception as error:
        _end_client()
        raise ServerError(reason(error)) from None
    if complaint:
        raise ServerError(reason(complaint))


def _logged(row: Values) -> Values:
    """A row as W&B's client takes it, with its own histograms."""
    return {
        name: wandb.Histogram(np_histogram=(value["values"], value["bins"])) if isinstance(value, dict) else value
        for name, value in row.items()
    }


def _finish_soon(run: Any, exit_code: int, seconds: float) -> None:
    """End a run whose artifacts are under way: W&B's finish_timeout does not count them, and it tries for hours."""
    try:
        within(seconds, lambda: run.finish(exit_code=exit_code))
    except Exception:
        _kill_client()
        _end_client()


def _kill_client() -> None:
    """End W&B's own process, which would not end before the server has answered it."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = status.read_text(errors="replace").partition(" (")
            name, _, facts = rest.rpartition(") ")
            if name == "wandb-core" and facts.split()[1] == str(os.getpid()):
                os.kill(int(number), signal.SIGKILL)


def _end_client() -> None:
    """End W&B's own process: of one that was killed it takes the exit code for ours, and leaves Python with it."""
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
