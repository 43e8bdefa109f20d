"""What each target is given of an experiment: plain values, taken from its config. A target renders them.

A target is a name of cluster.launcher; slurm.py has a Job, container.py a Container, cloud.py a Task. One more, as
Kubernetes, is a file beside these with plain values, its text and its golden files, and a function here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, completed
from pipeline.launch.attached import first_of
from pipeline.launch.cloud import Task, job_name
from pipeline.launch.container import Container, Mount, place
from pipeline.launch.plan import CONFIG, RECORD, numbered_checkpoints
from pipeline.launch.slurm import SCRIPT, Job, array_numbers

LINK = "run"  # what stands before "-<number>" in the links to the runs of an array

CONTAINER_SLACK = 30.0  # seconds after cluster.lead_seconds, at which ranks that have not saved are killed by their own

_AS_THEY_ARE = ("partition", "account", "qos", "constraint", "exclude", "memory", "minutes", "lead_minutes",
                "cpus_per_task", "container", "image", "launcher", "resubmit", "restarts", "interface",
                "infiniband", "check")  # fmt: skip
_LISTS = ("options", "modules", "setup", "mounts")


def runs_of(config: Config, array: str = "", sweep: str = "") -> list[Config]:
    """The runs that one command starts: one, or one for each number of an array, which is the end of its id.

    It is the seed, too, unless a sweep gives each its parameters. Raises ConfigError.
    """
    if not array:
        return [config]
    runs = [completed(config, run={"id": f"{config.run.id}-{number}"}) for number in numbers_of(array)]
    if sweep:
        return runs
    return [dataclasses.replace(run, seed=number) for run, number in zip(runs, numbers_of(array), strict=True)]


def numbers_of(array: str) -> list[int]:
    """Raises ConfigError."""
    try:
        return array_numbers(array) if array else [0]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def slurm_job(runs: Sequence[Config], array: str = "", sweep: str = "", links: Path | None = None) -> Job:
    """The job of a run, or of the runs of an array, all of one shape. Raises ConfigError.

    links: where the runs of an array are found by their numbers, if they are not named after those.
    """
    config, here = runs[0], Path.cwd()
    slurm, cluster = config.slurm, config.cluster
    name = config.run.id.removesuffix(f"-{numbers_of(array)[0]}") if array else config.run.id
    run = config.directory.absolute().with_name(name) if links is None else links / LINK
    for path in (str(run), str(here)):
        if "\\" in path or not path.isprintable():
            raise ConfigError(f"run.dir, run.id = {path!r}: Slurm reads a backslash or a line break in a path its own "
                              "way; choose another")  # fmt: skip
    inside = slurm.container != "none"
    places = [here, config.directory.absolute().parent]
    places += [Path(config.data.root).absolute()] if config.data.root and "://" not in config.data.root else []
    places += [Path(run.model.init).absolute().parent for run in runs if inside and _begins_from_file(run)]
    known = bool(config.data.cache) and "$" not in config.data.cache  # what a variable names the nodes alone know
    made = (Path(config.data.cache).expanduser().absolute(),) if inside and known else ()
    gpus = 0 if cluster.accelerator == "cpu" else cluster.devices
    same: dict[str, Any] = {field: getattr(slurm, field) for field in _AS_THEY_ARE}
    same |= {field: tuple(getattr(slurm, field)) for field in _LISTS}
    return Job(
        name=name, run=run, script=(links or config.directory.absolute()) / SCRIPT, directory=here,
        nodes=cluster.nodes, devices=cluster.devices, threads=config.trainer.threads, array=array,
        draws=bool(sweep),
        python=slurm.python or ("python3" if inside else sys.executable),
        gpus_per_node=gpus if slurm.gpus_per_node < 0 else slurm.gpus_per_node,
        places=(*places, *made) if inside else (), made=made, **same,
    )  # fmt: skip


def container_of(config: Config, driver: Path = Path("/proc/driver/nvidia/version")) -> Container:
    """The container of a node of the run. driver: there where this machine has GPUs. Raises ConfigError."""
    docker, cluster, data = config.docker, config.cluster, config.data
    engine = docker.engine or first_of("docker", "podman") or "docker"
    has_gpus = cluster.accelerator == "cuda" or (cluster.accelerator == "auto" and driver.exists())
    initial = config.model.init if _begins_from_file(config) else ""
    mounts = [Mount(source=Path(path).absolute(), target=_place(key, path), writable=writable)
              for key, path, writable in (("data.cache", data.cache, True), ("data.root", data.root, False),
                                          ("model.init", initial, False))
              if path and "://" not in path and not path.startswith("~") and "$" not in path]  # fmt: skip
    variables = ["WANDB_API_KEY"] if config.tracking.mode in ("auto", "online") else []
    _place("run.dir, run.id", str(config.directory))
    return Container(
        run=config.directory.absolute(), inside=str(config.directory), nodes=cluster.nodes, image=docker.image,
        engine=engine, rootless=engine == "podman" and os.getuid() != 0,
        user=docker.user or f"{os.getuid()}:{os.getgid()}", gpus=docker.gpus if has_gpus else "",
        shared_memory=docker.shared_memory, scratch=docker.scratch,
        data=tuple({mount.target: mount for mount in reversed(mounts)}.values()), mounts=tuple(docker.mounts),
        env_file=str(Path(docker.env_file).absolute()) if docker.env_file else "",
        variables=(*variables, *docker.variables), options=tuple(docker.options),
        address=docker.address or socket.gethostname(), port=docker.port, interface=docker.interface,
        stop_seconds=math.ceil(cluster.lead_seconds + CONTAINER_SLACK),
    )  # fmt: skip


def cloud_task(config: Config, config_file: Path, environment: Mapping[str, str] = os.environ) -> Task:
    """The SkyPilot task of a run whose config lies in a file of this machine. Raises ConfigError."""
    sky, cluster = config.skypilot, config.cluster
    if config.model.init and not numbered_checkpoints(config.directory):
        raise ConfigError(
            f"model.init = {config.model.init} is a file of this machine, which rented nodes do not see, and "
            f"{config.directory} has no checkpoint that would do without it; train here to a first one, copy the run's "
            f"directory to {sky.bucket.rstrip('/')}/{config.run.id}, and its config.yaml and checkpoints to another "
            "run.dir, and launch with that"
        )
    tracked = config.tracking.mode == "online" or (
        config.tracking.mode == "auto" and bool(environment.get("WANDB_API_KEY"))
    )
    return Task(
        name=job_name(config.run.id), run=_place("run.dir, run.id", str(config.directory)),
        config=config_file.absolute(), nodes=cluster.nodes, devices=cluster.devices, image=sky.image, bucket=sky.bucket,
        accelerator="" if cluster.accelerator == "cpu" else sky.accelerator, infra=sky.infra, cpus=sky.cpus,
        memory=sky.memory, disk_gb=sky.disk_gb, spot=sky.spot, python=sky.python,
        secrets=tuple(dict.fromkeys([*(["WANDB_API_KEY"] if tracked else []), *sky.secrets])),
    )  # fmt: skip


def _begins_from_file(config: Config) -> bool:
    """Whether model.init is there, to be shown to a container.

    Raises ConfigError where it is not, and the run needs it: it has no checkpoint.
    """
    if not config.model.init or Path(config.model.init).is_file():
        return bool(config.model.init)
    directory = config.directory
    looks = (directory / CONFIG).exists() and not (directory / RECORD).exists()  # a job that looks at nodes: no run
    if not looks and not numbered_checkpoints(directory):
        raise ConfigError(
            f"model.init = {config.model.init} is no file, and {directory} has no checkpoint that would do without "
            "it; bring the file back, or give another in a new run"
        )
    return False


def _place(key: str, path: str) -> str:
    """Where a container sees a path of the config. Raises ConfigError."""
    if not str(Path(path).absolute()).isprintable():
        raise ConfigError(f"{key} = {path!r} holds a line break or control character; choose another")
    try:
        return place(path)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
