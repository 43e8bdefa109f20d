"""pipeline launch: a run as a job of Slurm, from its submission to its end."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import preflight
from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb
from pipeline.cli.runs import typed
from pipeline.cli.settling import settle
from pipeline.cli.sweep import draw, in_sweep

if TYPE_CHECKING:
    from pipeline.config import Config


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "launch", launch, "submit a run to Slurm, or go on with one; look after it; cancel it",
        "pipeline launch recipe=bn_x5 data=imagenet cluster=slurm_4x8 slurm.partition=gpu run.id=first\n"
        "  pipeline launch --follow runs/first\n"
        "  pipeline launch --sweep vision/pipeline/x1y2z3 --array 0-7%2 recipe=bn_x5 data=cifar10 cluster=slurm_1x8"
        "\n\n"
        "pipeline doctor looks first: a fault in config or environment ends it with code 2, one in data with 3",
    )  # fmt: skip
    p.add_argument(
        "words", nargs="*", metavar="key=value | RUN/config.yaml",
        help="overrides of conf/config.yaml, or of a frozen config",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="show the script, and what doctor and Slurm say of it; stop")
    p.add_argument("--force", action="store_true", help="submit it although doctor has found a fault")
    p.add_argument("--array", default="", metavar="0-5%2", help="a run for each number, which is its seed and the end "
                   "of its id; after %%, how many at a time")  # fmt: skip
    p.add_argument("--sweep", default="", metavar="ENTITY/PROJECT/SWEEP", help="a sweep of W&B, which gives "
                   "each run its parameters when it first starts")  # fmt: skip
    p.add_argument("--status", metavar="RUN", help="how far a run is, and where its jobs stand")
    p.add_argument("--cancel", metavar="RUN", help="end a run's jobs; the command that launched it goes on")
    p.add_argument("--follow", metavar="RUN", help="show what a run prints, until Ctrl-C")
    p.add_argument("--draw", metavar="RUN", help="what a job does first in a run of a sweep: get its parameters, once "
                   "(exit code 4: there are no more)")  # fmt: skip


def launch(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError
    from pipeline.launch import queue
    from pipeline.launch.plan import identified
    from pipeline.launch.sweep import sweep_of

    looks = {"--status": (options.status, _status), "--cancel": (options.cancel, _cancel),
             "--follow": (options.follow, _follow), "--draw": (options.draw, draw)}  # fmt: skip
    asked = [flag for flag, (run, _) in looks.items() if run is not None]
    if len(asked) > 1 or (
        asked and (options.words or options.array or options.sweep or options.dry_run or options.force)
    ):
        raise ConfigError(
            f"{asked[0]} RUN stands alone; leave out {' '.join(asked[1:] or options.words) or 'the rest'}"
        )
    if asked:
        run, look = looks[asked[0]]
        return look(Path(run))

    config = typed(options.words)
    if config.cluster.launcher != "slurm":
        raise ConfigError(
            f"cluster.launcher = {config.cluster.launcher}: there is nothing to submit; choose cluster=slurm_1x8 or "
            "another page of Slurm, or train here with `pipeline train`"
        )
    if not (options.dry_run or queue.is_there()):
        raise queue.QueueError(
            "sbatch is not found: launch where Slurm's commands are, or look at the script with --dry-run"
        )
    config, sweep = in_sweep(config, options.sweep) if options.sweep else (config, sweep_of(config))
    config = identified(config)
    if options.dry_run:
        return _examined(config, options.array, sweep, show=True)
    return _submit(config, options.array, sweep, options.force)


def _submit(config: Config, array: str, sweep: str, force: bool) -> int:
    from pipeline.data.shards import MANIFEST, write_atomically
    from pipeline.launch import queue
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import freeze_run
    from pipeline.launch.slurm import JOBS, SCRIPT, render
    from pipeline.launch.sweep import with_parameters
    from pipeline.launch.targets import numbers_of, runs_of, slurm_job

    for run in runs_of(config, array, sweep):
        _refuse_second_job(run)
    code = _examined(config, array, sweep)
    if code and not force:
        print("pipeline: not submitted; mend what is at fault, or submit it all the same with --force", file=sys.stderr)
        return code
    config, dataset = settle(config, elsewhere=True)
    runs = [with_parameters(run) for run in runs_of(config, array, sweep)]
    with ExitStack() as held:
        for number, run in enumerate(runs):
            held.enter_context(locked(run.directory))
            runs[number] = freeze_run(run, sweep)
            write_atomically(run.directory / MANIFEST, (dataset.directory / MANIFEST).read_bytes())
            (run.directory / "logs").mkdir(exist_ok=True)
        script = render(slurm_job(runs, array, sweep))
        path = runs[0].directory / SCRIPT
        path.write_text(script)
    print(script)
    job = queue.submit(path)
    for run, number in zip(runs, numbers_of(array), strict=True):
        name = f"{job}_{number}" if array else job
        with (run.directory / JOBS).open("a") as file:
            file.write(f"{name}\n")
        print(f"job {name}: {run.run.id}, log {run.directory.absolute() / 'logs' / f'job-{name}.log'}")
    print(f"follow it with: pipeline launch --follow {runs[0].directory}")
    return DONE


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


def _status(directory: Path) -> int:
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


def _cancel(directory: Path) -> int:
    from pipeline.launch import queue

    alive = list(queue.states(_launched(directory)))
    if alive:
        queue.cancel(alive)
    print(f"{directory}: {'cancelled job ' + ', '.join(alive) if alive else 'no job is in the queue'}")
    return DONE


def _follow(directory: Path) -> int:
    from contextlib import suppress

    log = directory / "logs" / f"job-{_launched(directory)[-1]}.log"
    with suppress(KeyboardInterrupt):  # the way to leave it
        subprocess.run(["tail", "--lines=100", "-F", "--", str(log)], check=False)
    return DONE
