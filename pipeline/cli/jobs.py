"""pipeline launch with cluster.launcher=slurm: jobs of Slurm, from their submission to their end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import preflight
from pipeline.cli.codes import DONE
from pipeline.cli.settling import settle
from pipeline.cli.sweep import in_sweep

if TYPE_CHECKING:
    import argparse

    from pipeline.config import Config
    from pipeline.data.dataset import Dataset

_SHAPE = ("cluster.", "slurm.", "trainer.threads", "data.root", "data.cache")  # of what an array's one script is made


def start(config: Config, options: argparse.Namespace) -> int:
    from pipeline.launch.plan import identified
    from pipeline.launch.sweep import sweep_of

    _needs_slurm(options)
    config, sweep = in_sweep(config, options.sweep) if options.sweep else (config, sweep_of(config))
    config = identified(config)
    if options.dry_run:
        return _examined(config, options.array, sweep, show=True)
    return _submit(config, options.array, sweep, options.force)


def _needs_slurm(options: argparse.Namespace) -> None:
    from pipeline.launch import queue

    if not (options.dry_run or queue.is_there()):
        raise queue.QueueError(
            "sbatch is not found: launch where Slurm's commands are, or look at the script with --dry-run"
        )


def _submit(config: Config, array: str, sweep: str, force: bool) -> int:
    from pipeline.launch.sweep import with_parameters
    from pipeline.launch.targets import runs_of

    for run in runs_of(config, array, sweep):
        _refuse_second_job(run)
    code = _examined(config, array, sweep)
    if code and not force:
        print(preflight.NOT_SUBMITTED, file=sys.stderr)
        return code
    config, dataset = settle(config, elsewhere=True)
    runs = [(with_parameters(run), dataset) for run in runs_of(config, array, sweep)]
    _enqueue(runs, array, sweep)
    return DONE


def start_all(runs: Sequence[Config], options: argparse.Namespace) -> int:
    """Runs with names of their own, as one array. Raises ConfigError where they ask Slurm for different things."""
    import hashlib

    from pipeline.config import ConfigError, by_key
    from pipeline.launch.plan import agreed
    from pipeline.launch.slurm import render
    from pipeline.launch.targets import slurm_job

    shape = [{key: value for key, value in by_key(asdict(run)).items() if key.startswith(_SHAPE)} for run in runs]
    for key, value in shape[0].items():
        if other := next((each for each in shape if each[key] != value), None):
            raise ConfigError(
                f"{key} = {value} and {other[key]}: the elements of an array ask for the same; launch them apart"
            )
    _needs_slurm(options)
    digest = hashlib.sha256(" ".join(run.run.id for run in runs).encode()).hexdigest()[:12]
    links = runs[0].directory.absolute().parent / ".arrays" / digest
    array = f"0-{len(runs) - 1}"
    script = render(slurm_job([agreed(run) for run in runs], array, links=links))
    if options.dry_run:
        print(script, flush=True)
    code = preflight.before_submission(agreed(runs[0]), script, whole=options.dry_run)
    if options.dry_run:
        return code
    if code and not options.force:
        print(preflight.NOT_SUBMITTED, file=sys.stderr)
        return code
    _enqueue([settle(run, elsewhere=True) for run in runs], array, links=links)
    return DONE


def _enqueue(runs: Sequence[tuple[Config, Dataset]], array: str, sweep: str = "", links: Path | None = None) -> None:
    """Freeze the runs, write the script of their job, and submit it.

    links: where an array finds runs that are not named after its numbers. Raises ConfigError for one that has a job.
    """
    from pipeline.data.shards import MANIFEST, write_atomically
    from pipeline.launch import queue
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import freeze_run
    from pipeline.launch.slurm import JOBS, SCRIPT, render
    from pipeline.launch.targets import LINK, numbers_of, slurm_job

    numbers = numbers_of(array)
    frozen: list[Config] = []
    with ExitStack() as held:
        for number, (run, dataset) in zip(numbers, runs, strict=True):
            held.enter_context(locked(run.directory))
            _refuse_second_job(run)  # of another launch, while the doctor looked
            frozen.append(freeze_run(run, sweep))
            write_atomically(run.directory / MANIFEST, (dataset.directory / MANIFEST).read_bytes())
            (run.directory / "logs").mkdir(exist_ok=True)
            if links:
                links.mkdir(parents=True, exist_ok=True)
                link = links / f"{LINK}-{number}"
                if not link.is_symlink():
                    link.symlink_to(Path("..") / ".." / run.run.id)
        script = render(slurm_job(frozen, array, sweep, links))
        path = (links or frozen[0].directory) / SCRIPT
        path.write_text(script)
        print(script)
        job = queue.submit(path)
        for run, number in zip(frozen, numbers, strict=True):
            name = f"{job}_{number}" if array else job
            with (run.directory / JOBS).open("a") as file:
                file.write(f"{name}\n")
            print(f"job {name}: {run.run.id}, log {run.directory.absolute() / 'logs' / f'job-{name}.log'}")
    print(f"follow {'it' if len(frozen) == 1 else 'the first'} with: pipeline launch --follow {frozen[0].directory}")


def is_queued(run: Config) -> bool:
    """Whether a job of it is in the queue."""
    from pipeline.launch import queue

    jobs = _jobs(run.directory)
    return bool(jobs and queue.states(jobs))


def _examined(config: Config, array: str, sweep: str, *, show: bool = False) -> int:
    """What the doctor says of the first run and the job of all: its exit code. Writes, packs and indexes nothing.

    show: the script on stdout, the whole table on stderr.
    """
    from pipeline.launch.plan import agreed
    from pipeline.launch.slurm import render
    from pipeline.launch.sweep import refuse_other_sweep, with_parameters
    from pipeline.launch.targets import runs_of, slurm_job

    runs = runs_of(config, array, sweep)
    for run in runs:
        refuse_other_sweep(run, sweep)
    runs = [agreed(with_parameters(run)) for run in runs]
    script = render(slurm_job(runs, array, sweep))
    if show:
        print(script, flush=True)
    return preflight.before_submission(runs[0], script, whole=show)


def _refuse_second_job(run: Config) -> None:
    from pipeline.config import ConfigError
    from pipeline.launch import queue

    for job, state in queue.states(_jobs(run.directory)).items():
        raise ConfigError(
            f"run.id = {run.run.id} has job {job} in the queue ({state}); leave it to that, or end it first with: "
            f"pipeline launch --cancel {run.directory}"
        )


def _jobs(directory: Path) -> list[str]:
    from pipeline.launch.slurm import JOBS

    try:
        return (directory / JOBS).read_text().split()
    except FileNotFoundError:
        return []


def _launched(directory: Path) -> list[str]:
    """The jobs of a run, the newest last. Raises ConfigError if there are none."""
    from pipeline.config import ConfigError

    jobs = _jobs(directory)
    if not jobs:
        raise ConfigError(f"{directory} holds no run that was launched; give a directory like runs/NAME")
    return jobs


def status(directory: Path) -> int:
    from pipeline.launch import queue
    from pipeline.launch.plan import newest_step, read_record

    jobs = _launched(directory)
    record, states = read_record(directory), queue.states(jobs)
    print(f"{directory}: checkpoint of step {newest_step(directory)}, {len(record.starts)} starts")
    for start in record.starts[-5:]:
        ended = f"{start.get('ended', 'has not said how it ended')} {start.get('ended_at', '')}".strip()
        print(f"  {start['at']} from step {start.get('step', 0)} on {start['world']} ranks: {ended}")
    for job in jobs[-5:]:
        print(f"job {job}: {states.get(job, 'not in the queue')}")
    return DONE


def cancel(directory: Path) -> int:
    from pipeline.launch import queue

    alive = list(queue.states(_launched(directory)))
    if alive:
        queue.cancel(alive)
    print(f"{directory}: {'cancelled job ' + ', '.join(alive) if alive else 'no job is in the queue'}")
    return DONE


def follow(directory: Path) -> int:
    from contextlib import suppress

    log = directory / "logs" / f"job-{_launched(directory)[-1]}.log"
    with suppress(KeyboardInterrupt):  # the way to leave it
        subprocess.run(["tail", "--lines=100", "-F", "--", str(log)], check=False)
    return DONE
