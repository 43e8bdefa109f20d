"""A run of a W&B sweep: waiting for its parameters, and then the run that they made of it, from start to start.

run.json holds both: `sweep.id` from the submission on, `sweep.parameters` once they were drawn, with the W&B id of the
run that the sweep gave. They are noted before anything is made of them, so that no start ever draws twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipeline.config import KEYS, Config, ConfigError, by_key, completed, nearest, overridden
from pipeline.launch.plan import RECORD, read_record, rewrite

# What the job and the data have settled before a sweep is asked.
SETTLED = ("run.", "cluster.", "slurm.", "tracking.", "data.root", "data.source", "data.train", "data.val",
           "data.cache", "data.digest", "data.num_classes", "data.decoder")  # fmt: skip


def check_names(names: list[str]) -> None:
    """Parameters of a sweep are keys of a run. Raises ConfigError."""
    for name in names:
        if name not in KEYS:
            raise ConfigError(f"the sweep's parameter {name} is not a key{nearest(name, KEYS)}; "
                              "`pipeline train --print-config` lists all")  # fmt: skip
        if name.startswith(SETTLED):
            raise ConfigError(f"the sweep's parameter {name} is settled before it is asked; give it to the launch, as "
                              f"{name}=VALUE")  # fmt: skip


def with_parameters(config: Config) -> Config:
    """The config with what its run has drawn, if it has. Raises ConfigError for values that cannot run."""
    parameters = _parameters(config)
    if parameters is None:
        return config
    flat = by_key(dict(parameters))
    check_names(list(flat))
    try:
        return overridden(config, flat)
    except ConfigError as error:
        raise ConfigError(f"the sweep's parameters: {error}") from None


def is_ready(config: Config) -> bool:
    """Whether it has drawn, and its frozen config says what."""
    return _parameters(config) is not None and with_parameters(config) == config


def adopt(config: Config, run: str, agent: str, parameters: Mapping[str, Any]) -> None:
    """Note what was drawn."""
    record = read_record(config.directory)
    record.wandb_id = run
    record.sweep |= {"agent": agent, "parameters": dict(parameters)}
    rewrite(config, record)


def freeze_drawn(config: Config) -> None:
    """Freeze what was drawn. Raises ConfigError for values that cannot run."""
    rewrite(with_parameters(config), read_record(config.directory))


def sweep_of(config: Config) -> str:
    """The sweep to which a run's directory belongs; "" for none."""
    known = config.run.id and (config.directory / RECORD).exists()
    return str(read_record(config.directory).sweep.get("id", "")) if known else ""


def refuse_other_sweep(config: Config, sweep: str) -> None:
    """Raises ConfigError where a run that is there already belongs elsewhere than to this sweep ("" for none)."""
    if not (config.directory / RECORD).exists():
        return
    record = read_record(config.directory)
    known = str(record.sweep.get("id", ""))
    if known != sweep and (known or record.starts):
        where = f"belongs to sweep {known}" if known else "has begun outside of a sweep"
        raise ConfigError(f"run.id = {config.run.id} {where}; choose a new run.id, or launch it "
                          f"{f'with --sweep {known}' if known else 'without --sweep'}")  # fmt: skip


def by_agent(config: Config, environment: Mapping[str, str] = os.environ) -> Config:
    """The config of a run that `wandb agent` starts on this machine: in the agent's project, under a name that the same
    W&B run has again, should the agent go on with it. Any other as it is.
    """
    sweep, run = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
    if not (sweep and run):
        return config
    tracking = config.tracking
    config = completed(config, tracking={"project": environment.get("WANDB_PROJECT") or tracking.project,
                                         "entity": environment.get("WANDB_ENTITY") or tracking.entity})  # fmt: skip
    return config if config.run.id else completed(config, run={"id": f"{sweep}-{run}"})


def _parameters(config: Config) -> dict[str, Any] | None:
    known = (config.directory / RECORD).exists()
    found: dict[str, Any] | None = read_record(config.directory).sweep.get("parameters") if known else None
    return found
