"""What each target is given of an experiment: plain values, taken from its config. A target renders them.

A target is a name of cluster.launcher; that of slurm.py is a Job.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, completed
from pipeline.launch.slurm import SCRIPT, Job, array_numbers

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


def slurm_job(runs: Sequence[Config], array: str = "", sweep: str = "") -> Job:
    """The job of a run, or of the runs of an array, all of one shape. Raises ConfigError."""
    config, here = runs[0], Path.cwd()
    slurm, cluster = config.slurm, config.cluster
    name = config.run.id.removesuffix(f"-{numbers_of(array)[0]}") if array else config.run.id
    run = config.directory.absolute().with_name(name)
    for path in (str(run), str(here)):
        if "\\" in path or not path.isprintable():
            raise ConfigError(f"run.dir, run.id = {path!r}: Slurm reads a backslash or a line break in a path its own "
                              "way; choose another")  # fmt: skip
    inside = slurm.container != "none"
    places = [here, config.directory.absolute().parent]
    places += [Path(config.data.root).absolute()] if config.data.root and "://" not in config.data.root else []
    known = bool(config.data.cache) and "$" not in config.data.cache  # what a variable names the nodes alone know
    made = (Path(config.data.cache).expanduser().absolute(),) if inside and known else ()
    gpus = 0 if cluster.accelerator == "cpu" else cluster.devices
    same: dict[str, Any] = {field: getattr(slurm, field) for field in _AS_THEY_ARE}
    same |= {field: tuple(getattr(slurm, field)) for field in _LISTS}
    return Job(
        name=name, run=run, script=config.directory.absolute() / SCRIPT, directory=here,
        nodes=cluster.nodes, devices=cluster.devices, threads=config.trainer.threads, array=array,
        draws=bool(sweep),
        python=slurm.python or ("python3" if inside else sys.executable),
        gpus_per_node=gpus if slurm.gpus_per_node < 0 else slurm.gpus_per_node,
        places=(*places, *made) if inside else (), made=made, **same,
    )  # fmt: skip
