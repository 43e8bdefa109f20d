"""pipeline launch with cluster.launcher=skypilot: a run as a managed job on machines that SkyPilot rents."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import preflight
from pipeline.cli.codes import DONE, FAILED
from pipeline.cli.settling import settle

if TYPE_CHECKING:
    import argparse

    from pipeline.config import Config


def start(config: Config, options: argparse.Namespace) -> int:
    from pipeline.launch.plan import identified

    config = identified(config)
    _refuse_run_of_here(config)
    code = _examined(config, show=options.dry_run)
    if options.dry_run:
        return code
    if code and not options.force:
        print(preflight.NOT_SUBMITTED, file=sys.stderr)
        return code
    return _submit(config)


def _submit(config: Config) -> int:
    from pipeline.config import ConfigError, completed, to_yaml
    from pipeline.data.shards import write_atomically
    from pipeline.launch import cloud
    from pipeline.launch.attached import CommandError, attached, first_of
    from pipeline.launch.plan import CONFIG, agreed, named
    from pipeline.launch.targets import cloud_task

    there = bool(first_of("sky"))
    if there:
        for job, state in cloud.states(cloud.job_name(config.run.id)).items():
            raise ConfigError(
                f"run.id = {config.run.id} has job {job} ({state}); leave it to that, or end it first with: "
                f"pipeline launch --cancel {config.directory}"
            )
    decoder, threads = config.data.decoder, config.trainer.threads
    config = agreed(named(settle(config, elsewhere=True)[0]))
    config = completed(config, data={"decoder": decoder}, trainer={"threads": threads})  # else a node fills them in
    file, path = config.directory / CONFIG, config.directory / cloud.TASK
    write_atomically(file, to_yaml(config).encode())
    task = cloud_task(config, file)
    text = cloud.render(task)
    write_atomically(path, text.encode())
    print(text, flush=True)
    command = cloud.launch_command(task, path, [name for name in task.secrets if os.environ.get(name)])
    if not there:
        raise CommandError(f"sky is not found; where SkyPilot is installed, submit it with: {shlex.join(command)}")
    if code := attached(command):
        print(f"pipeline: sky did not take the job (code {code}), it says above why; mend that, and submit it again "
              f"with: {config.way_on}", file=sys.stderr)  # fmt: skip
        return FAILED
    print(f"job {task.name}; follow it with: pipeline launch --follow {config.directory}")
    return DONE


def _examined(config: Config, *, show: bool) -> int:
    from pipeline.launch.cloud import render
    from pipeline.launch.plan import CONFIG, agreed
    from pipeline.launch.targets import cloud_task

    text = render(cloud_task(agreed(config), config.directory / CONFIG))
    if show:
        print(text, flush=True)
    return preflight.before_submission(config, text, whole=show)


def _refuse_run_of_here(config: Config) -> None:
    """A run whose checkpoints lie on this machine would begin anew there, under its old name."""
    from pipeline.config import ConfigError
    from pipeline.launch.plan import STARTED

    if (config.directory / STARTED).exists():
        raise ConfigError(
            f"run.id = {config.run.id} began on this machine, and a rented node does not see {config.directory}; copy "
            f"that to {config.skypilot.bucket.rstrip('/')}/{config.run.id}, and launch with another run.dir, or choose "
            "a new run.id"
        )


def status(directory: Path) -> int:
    from pipeline.config import read_config
    from pipeline.launch.cloud import states
    from pipeline.launch.plan import CONFIG

    config = read_config(directory / CONFIG)
    jobs = states(_name(directory))
    for job, state in jobs.items():
        print(f"job {job}: {state}")
    if not jobs:
        print(f"{directory}: no job of it goes on; see `sky jobs queue`")
    print(f"its directory is {config.skypilot.bucket.rstrip('/')}/{directory.absolute().name}")
    return DONE


def cancel(directory: Path) -> int:
    return _passed_on("cancel", "--yes", "--name", _name(directory))


def follow(directory: Path) -> int:
    return _passed_on("logs", "--name", _name(directory))


def _passed_on(*words: str) -> int:
    """A verb of `sky jobs`; its code is 0 or 1 to us."""
    from pipeline.launch.attached import CommandError, attached, first_of

    if not first_of("sky"):
        raise CommandError(f"sky is not found; where SkyPilot is installed: {shlex.join(('sky', 'jobs', *words))}")
    return FAILED if attached(["sky", "jobs", *words]) else DONE


def _name(directory: Path) -> str:
    from pipeline.config import read_config
    from pipeline.launch.cloud import job_name
    from pipeline.launch.plan import CONFIG

    return job_name(read_config(directory / CONFIG).run.id)
