"""pipeline launch --sweep: before the submission, and before the first start of each element of the array."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE, NOTHING_LEFT, RESUMABLE, USAGE
from pipeline.cli.runs import typed
from pipeline.cli.sync import place_of

if TYPE_CHECKING:
    from pipeline.config import Config

LOOK_SECONDS = 5.0  # for W&B to answer where somebody waits for it
DRAW_SECONDS, PATIENCE = 60.0, 300.0  # for W&B to answer a job, and for the sweep to have parameters


def in_sweep(config: Config, text: str) -> tuple[Config, str]:
    """The config of runs that belong to a sweep, where W&B has it and its parameters are keys; and the sweep's id.

    Raises ConfigError.
    """
    from pipeline.callbacks.sweep import Sweep, SweepError, parameters_of
    from pipeline.callbacks.wandb_server import ServerError, wandb_mode
    from pipeline.config import ConfigError, completed
    from pipeline.launch.sweep import check_names

    otherwise = "or leave --sweep out: --array 0-7 makes runs of the seeds 0 to 7"
    mode = wandb_mode(config.tracking.mode)
    if mode != "online":
        why = "there is no key; set WANDB_API_KEY, or run `wandb login`" if config.tracking.mode == "auto" else (
            f"tracking.mode = {mode}; choose auto or online")  # fmt: skip
        raise ConfigError(f"--sweep {text} needs W&B's server, and {why}, {otherwise}")
    try:
        sweep = Sweep.of(text, config.tracking.project)
        names = parameters_of(sweep, seconds=LOOK_SECONDS)
    except SweepError as error:
        raise ConfigError(f"--sweep {text}: {error}") from None
    except ServerError as error:
        raise ConfigError(f"--sweep {text}: {error}; try again later, {otherwise}") from None
    check_names(names)
    entity = sweep.entity or config.tracking.entity
    return completed(config, tracking={"entity": entity, "project": sweep.project}), sweep.id


def draw(directory: Path) -> int:
    """Give a run the parameters of its sweep, once: 0, 4 where the sweep has no more, 75 where W&B cannot be had.

    Raises ConfigError where there is no key to ask with.
    """
    from pipeline.callbacks import sweep
    from pipeline.callbacks.wandb_server import ServerError, wandb_mode
    from pipeline.config import ConfigError
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import CONFIG, read_record
    from pipeline.launch.sweep import adopt, freeze_drawn, is_ready, with_parameters

    config, record = typed([str(directory / CONFIG)]), read_record(directory)
    if not record.sweep:
        raise ConfigError(f"{directory} is no run of a sweep; submit one with: pipeline launch --sweep SWEEP ...")
    if is_ready(config):
        return DONE
    place = sweep.Sweep(config.tracking.entity, config.tracking.project, str(record.sweep["id"]))
    if wandb_mode("auto") != "online":  # at another start there would be none again
        raise ConfigError(
            f"sweep {place}: no key of W&B is seen on {socket.gethostname()}, where its run starts; launch it with "
            "WANDB_API_KEY set, or let the container see ~/.netrc (slurm.mounts)"
        )
    with locked(directory):
        if "parameters" not in read_record(directory).sweep:  # asked again: who held the lock may have drawn
            try:
                drawn = sweep.draw(place, seconds=DRAW_SECONDS, patience=PATIENCE)
            except ServerError as error:
                print(f"pipeline: sweep {place}: {error}", file=sys.stderr)
                return RESUMABLE
            if drawn is None:
                print(f"sweep {place} has no more parameters")
                return NOTHING_LEFT
            adopt(config, drawn.run, drawn.agent, drawn.parameters)
            shown = ", ".join(f"{name}={value}" for name, value in drawn.parameters.items())
            print(f"run {drawn.run} of sweep {place}: {shown}", flush=True)
        try:
            _check_batch(with_parameters(config))
        except ConfigError:
            _tell_of_failure(config)
            raise
        freeze_drawn(config)
    return DONE


def _check_batch(config: Config) -> None:
    """What a launch checks of the data, with the batch that was drawn. Raises ConfigError."""
    from pipeline.config import ConfigError
    from pipeline.data.shards import read_manifest

    images = read_manifest(config.directory).count("train")
    if config.data.global_batch_size > images:
        raise ConfigError(
            f"the sweep's parameters: data.global_batch_size = {config.data.global_batch_size} exceeds the {images} "
            "training images; lower it in the sweep"
        )


def _tell_of_failure(config: Config) -> None:
    """W&B's run of these parameters has failed, so that the sweep does not wait for it."""
    from pipeline.callbacks.wandb_reporter import send
    from pipeline.callbacks.wandb_server import ServerError
    from pipeline.launch.plan import read_record

    try:
        send(
            place_of(config, read_record(config.directory)), config.directory, [], exit_code=USAGE, seconds=DRAW_SECONDS
        )
    except ServerError as error:
        print(f"pipeline: W&B does not know that this run failed: {error}", file=sys.stderr)
