"""pipeline launch: a run as a job of Slurm, from its submission to its end."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.codes import DONE
from pipeline.cli.options import add_verb
from pipeline.cli.runs import typed
from pipeline.cli.settling import settle

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.launch.slurm import Job


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "launch", launch, "submit a run to Slurm, or go on with one; look after it; cancel it",
        "pipeline launch recipe=bn_x5 data=imagenet cluster=slurm_4x8 slurm.partition=gpu run.id=first\n"
        "  pipeline launch --follow runs/first",
    )  # fmt: skip
    p.add_argument(
        "words", nargs="*", metavar="key=value | RUN/config.yaml",
        help="overrides of conf/config.yaml, or of a frozen config",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="show the script, ask Slurm whether it would take it, stop")
    p.add_argument("--array", default="", metavar="0-5%2", help="a run for each number, which is its seed and the end "
                   "of its id; after %%, how many at a time")  # fmt: skip
    p.add_argument("--status", metavar="RUN", help="how far a run is, and where its jobs stand")
    p.add_argument("--cancel", metavar="RUN", help="end a run's jobs; the command that launched it goes on")
    p.add_argument("--follow", metavar="RUN", help="show what a run prints, until Ctrl-C")


def launch(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError
    from pipeline.launch import queue
    from pipeline.launch.plan import identified

    looks = {"--status": (options.status, _status), "--cancel": (options.cancel, _cancel),
             "--follow": (options.follow, _follow)}  # fmt: skip
    asked = [flag for flag, (run, _) in looks.items() if run is not None]
    if len(asked) > 1 or (asked and (options.words or options.array or options.dry_run)):
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
    config = identified(config)
    return _dry_run(config, options.array) if options.dry_run else _submit(config, options.array)


def _submit(config: Config, array: str) -> int:
    from pipeline.data.shards import MANIFEST, write_atomically
    from pipeline.launch import queue
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import freeze_run
    from pipeline.launch.slurm import JOBS, SCRIPT, render

    for run in _runs(config, array):
        _refuse_second_job(run)
    config, dataset = settle(config)
    runs = _runs(config, array)
    with ExitStack() as held:
        for number, run in enumerate(runs):
            held.enter_context(locked(run.directory))
            runs[number] = freeze_run(run)
            write_atomically(run.directory / MANIFEST, (dataset.directory / MANIFEST).read_bytes())
            (run.directory / "logs").mkdir(exist_ok=True)
        script = render(_job(runs, array))
        path = runs[0].directory / SCRIPT
        path.write_text(script)
    print(script)
    job = queue.submit(path)
    for run, number in zip(runs, _numbers(array), strict=True):
        name = f"{job}_{number}" if array else job
        with (run.directory / JOBS).open("a") as file:
            file.write(f"{name}\n")
        print(f"job {name}: {run.run.id}, log {run.directory.absolute() / 'logs' / f'job-{name}.log'}")
    print(f"follow it with: pipeline launch --follow {runs[0].directory}")
    return DONE


def _dry_run(config: Config, array: str) -> int:
    """The script, and what Slurm says of it. The run's directory stays as it is, or absent."""
    import tempfile

    from pipeline.launch import queue
    from pipeline.launch.plan import agreed
    from pipeline.launch.slurm import SCRIPT, render

    config, _ = settle(config)
    runs = [agreed(run) for run in _runs(config, array)]
    script = render(_job(runs, array))
    print(script)
    if not queue.is_there():
        print("sbatch is not found here: Slurm was not asked about it", file=sys.stderr)
        return DONE
    with tempfile.TemporaryDirectory(prefix="pipeline-") as directory:
        path = Path(directory) / SCRIPT
        path.write_text(script)
        print(queue.tested(path), file=sys.stderr)
    return DONE


def _runs(config: Config, array: str) -> list[Config]:
    """The runs that one command submits: one, or one for each number of an array."""
    from pipeline.config import ConfigError, completed

    if not array:
        return [config]
    try:
        numbers = _numbers(array)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    runs = [completed(config, run={"id": f"{config.run.id}-{number}"}) for number in numbers]
    return [dataclasses.replace(run, seed=number) for run, number in zip(runs, numbers, strict=True)]


def _numbers(array: str) -> list[int]:
    from pipeline.launch.slurm import array_numbers

    return array_numbers(array) if array else [0]


def _stem(runs: Sequence[Config], array: str) -> str:
    """The id that the runs of an array share."""
    name = runs[0].run.id
    return name.removesuffix(f"-{_numbers(array)[0]}") if array else name


def _refuse_second_job(run: Config) -> None:
    from pipeline.config import ConfigError
    from pipeline.launch import queue

    for job, state in queue.states(_jobs(run.directory)).items():
        raise ConfigError(
            f"run.id = {run.run.id} has job {job} in the queue ({state}); leave it to that, or end it first with: "
            f"pipeline launch --cancel {run.directory}"
        )


def _job(runs: Sequence[Config], array: str) -> Job:
    from pipeline.config import ConfigError
    from pipeline.launch.slurm import SCRIPT, Job

    config, here = runs[0], Path.cwd()
    slurm, cluster = config.slurm, config.cluster
    run = config.directory.absolute().with_name(_stem(runs, array))
    for path in (str(run), str(here)):
        if "\\" in path or not path.isprintable():
            raise ConfigError(f"run.dir, run.id = {path!r}: Slurm reads a backslash or a line break in a path its own "
                              "way; choose another")  # fmt: skip
    inside = slurm.container != "none"
    places = [here, config.directory.absolute().parent]
    places += [Path(path).absolute() for path in (config.data.root, config.data.cache) if path and "://" not in path]
    gpus = 0 if cluster.accelerator == "cpu" else cluster.devices
    same: dict[str, Any] = {
        name: getattr(slurm, name)
        for name in ("partition", "account", "qos", "constraint", "exclude", "memory", "minutes", "lead_minutes",
                     "cpus_per_task", "container", "image", "launcher", "resubmit", "restarts", "interface")
    }  # fmt: skip
    same |= {name: tuple(getattr(slurm, name)) for name in ("options", "modules", "setup", "mounts")}
    return Job(
        name=_stem(runs, array), run=run, script=config.directory.absolute() / SCRIPT, directory=here,
        nodes=cluster.nodes, devices=cluster.devices, threads=config.trainer.threads, array=array,
        python=slurm.python or ("python3" if inside else sys.executable),
        gpus_per_node=gpus if slurm.gpus_per_node < 0 else slurm.gpus_per_node,
        places=tuple(places) if inside else (), **same,
    )  # fmt: skip


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
