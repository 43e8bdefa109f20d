"""Trainings and evaluations of an experiment: runs of the product, each in a process and a directory of its own.

As many at once as there are cores, a thread each. One that is done is not done again, one that was interrupted goes
on: so does the experiment.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.experiments.curve import Curve
from pipeline.experiments.experiment import Measured, Setting
from pipeline.experiments.versions import fingerprint, versions
from pipeline.launch.failure import AGAIN, NOT_AGAIN, FailedRunError
from pipeline.report.record import Run, read_run

_NO_NUMBER = ("is no number", "are no numbers")  # what losses.py says
_LOOK_SECONDS = 0.2
_ENSEMBLE = "ensemble.json"  # of run/ensembles.py, which takes seconds to load


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that has come to its end, or to where its numbers were none any more."""

    run: Run
    curve: Curve


@dataclass(slots=True)
class _Job:
    name: str
    directory: Path
    log: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def is_done(self) -> bool:
        has_begun = (self.directory / "config.yaml").is_file()
        return (has_begun and read_run(self.directory).state == "done") or _diverged(self.log)


@dataclass(slots=True)
class _Evaluation(_Job):
    @property
    def is_done(self) -> bool:
        return (self.directory / _ENSEMBLE).is_file()


def trained(wanted: Mapping[str, Sequence[str]], setting: Setting) -> dict[str, Trained]:
    """Train, or read what was trained before. wanted: by name, key=value words as of `pipeline train`.

    Raises KeyboardInterrupt where it was interrupted, after every run has saved; FailedRunError where one failed for
    another reason than its loss.
    """
    jobs = [_job(name, words, setting) for name, words in wanted.items()]
    _do(jobs, setting)
    return {name: _read(job) for name, job in zip(wanted, jobs, strict=True)}


def evaluated(wanted: Mapping[str, tuple[Sequence[Path], int]], setting: Setting) -> dict[str, Measured]:
    """Score runs alone and as an ensemble, or read what was scored before: what `pipeline evaluate` keeps of it.

    wanted: by name, directories of runs, and views of each image. Raises as `trained` does.
    """
    jobs = [_evaluation(name, runs, views, setting) for name, (runs, views) in wanted.items()]
    _do(jobs, setting)
    return {name: json.loads((job.directory / _ENSEMBLE).read_bytes())
            for name, job in zip(wanted, jobs, strict=True)}  # fmt: skip


def _do(jobs: Sequence[_Job], setting: Setting) -> None:
    """All that are not done yet."""
    setting.work.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not job.is_done]
    done, total, running = len(jobs) - len(waiting), len(jobs), list[_Job]()
    at_once = 1 if setting.device == "cuda" else len(os.sched_getaffinity(0))
    with _interrupts() as came:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(_begun(waiting.pop(0)))
                setting.progress(done, total, ", ".join(job.name for job in running))
                time.sleep(_LOOK_SECONDS)
                if came:
                    raise KeyboardInterrupt
                for job in [job for job in running if _has_ended(job)]:
                    running.remove(job)
                    done += 1
                    _check(job)
        except BaseException:  # whatever ends us: none of them may go on by itself
            _end(running, came)
            raise
    setting.progress(total, total, "")


def _read(job: _Job) -> Trained:
    run = read_run(job.directory)
    known = np.isfinite(run.val["top1"])
    return Trained(run, Curve(run.val["step"][known], run.val["top1"][known], _diverged(job.log)))


def _job(name: str, words: Sequence[str], setting: Setting) -> _Job:
    """Of other words, images or versions it is another run: what lies there from before is not taken for it."""
    called = _called(name, [*words], setting)
    command = [sys.executable, "-m", "pipeline", "train", *words, f"run.dir={setting.work}", f"run.id={called}",
               "tracking.mode=disabled", f"cluster.accelerator={setting.device}"]  # fmt: skip
    if setting.device == "cpu":
        command.append("trainer.threads=1")
    return _Job(name, setting.work / called, setting.work / f"{called}.log", command)


def _evaluation(name: str, runs: Sequence[Path], views: int, setting: Setting) -> _Evaluation:
    places = [str(run) for run in runs]
    called = _called(name, [*places, views], setting)
    directory = setting.work / called
    command = [sys.executable, "-m", "pipeline", "evaluate", *places, "--views", str(views), "--no-page",
               "--output", str(directory), f"cluster.accelerator={setting.device}"]  # fmt: skip
    return _Evaluation(name, directory, setting.work / f"{called}.log", command)


def _called(name: str, what: Sequence[str | int], setting: Setting) -> str:
    images = {page: fingerprint(place) for page, place in sorted(setting.data.items())}
    told = json.dumps([*what, setting.device, images, versions()])
    return f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def _begun(job: _Job) -> _Job:
    """A session of its own, so that Ctrl-C reaches it once, through us."""
    with job.log.open("wb") as log:
        job.process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return job


def _has_ended(job: _Job) -> bool:
    return job.process is not None and job.process.poll() is not None


def _end(jobs: Sequence[_Job], came: Sequence[int]) -> None:
    """Ask them to save, and wait for it; a signal that came twice, or more often, no longer waits."""
    for job in jobs:
        assert job.process is not None
        job.process.send_signal(signal.SIGTERM)
    while any(job.process is not None and job.process.poll() is None for job in jobs):
        if len(came) > 1:
            for job in jobs:
                assert job.process is not None
                job.process.kill()
        time.sleep(_LOOK_SECONDS)


def _check(job: _Job) -> None:
    """Raises KeyboardInterrupt for a run that somebody interrupted, FailedRunError for one that failed by itself."""
    assert job.process is not None
    code = job.process.returncode
    if code == AGAIN:
        raise KeyboardInterrupt
    if code and not _diverged(job.log):
        last = [line for line in job.log.read_text().splitlines() if line.strip()] or [f"code {code}"]
        message = f"{job.name}: {last[-1].removeprefix('pipeline: ')} (all it said: {job.log})"
        raise FailedRunError(message, code=code if code > 0 else NOT_AGAIN)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Signals that ask for an end, from now on; one that is ignored, as under nohup, stays so."""
    came: list[int] = []
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if signal.getsignal(number) is not signal.SIG_IGN]  # fmt: skip
    previous = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _diverged(log: Path) -> bool:
    said = log.read_text() if log.is_file() else ""
    return any(words in said for words in _NO_NUMBER)
