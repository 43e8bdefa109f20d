"""A run's directory before its first process: the frozen config and run.json, or the refusal to reuse it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, completed, differences, read_config, to_yaml

CONFIG, RECORD = "config.yaml", "run.json"
STOPPED = ".stopped"  # there, once W&B has said that the run is to end
STARTED = "metrics.csv"  # without it a run has not begun, and may still become another one


@dataclass(slots=True)
class RunRecord:
    """run.json: what must outlive processes. wandb_id: the run's place in W&B. starts: when and where.

    sweep: empty, or the `id` of the sweep to which it belongs, and what it has drawn there (launch/sweep.py).
    """

    wandb_id: str
    starts: list[dict[str, object]] = field(default_factory=list)
    sweep: dict[str, Any] = field(default_factory=dict)


def new_run_id(config: Config) -> str:
    """recipe-data-time, for a run that was given no name."""
    return f"{config.run.recipe}-{config.run.data}-{datetime.now(tz=UTC):%Y%m%d-%H%M%S}"


def identified(config: Config) -> Config:
    """The config with an id: the one it was given, or one that no directory has yet."""
    if config.run.id:
        return config
    made = completed(config, run={"id": new_run_id(config)})
    while made.directory.exists():  # another run began in this second
        made = completed(config, run={"id": f"{new_run_id(config)}-{secrets.token_hex(2)}"})
    return made


def named(config: Config) -> Config:
    """The config with an id, for which a directory is made if there was none. Raises ConfigError."""
    config = identified(config)
    try:
        config.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(config, error) from None
    return config


def open_run(config: Config) -> Config:
    """Make a directory a run's, or open it to go on, and note a start there; returns the config to freeze.

    Raises ConfigError if the directory cannot be written, holds a run that is another one, or one that fails each time.
    """
    config = freeze_run(config)
    begin_run(config)
    return config


def freeze_run(config: Config, sweep: str = "") -> Config:
    """`open_run` without the start, which the run's first process notes where it begins. Raises as that does.

    sweep: the one to which it belongs.
    """
    config = agreed(named(config))
    directory = config.directory
    try:
        record = read_record(directory) if (directory / RECORD).exists() else _new_record()
        if sweep:
            record.sweep["id"] = sweep
        refuse_crash_loop(config, record, newest_step(directory))
        rewrite(config, record)
    except OSError as error:
        raise _unwritable(config, error) from None
    return config


def _new_record() -> RunRecord:
    """Of a run that begins: in W&B under an id of its own, or the one that an agent of W&B started it with."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if sweep and run:
        return RunRecord(wandb_id=run, sweep={"id": sweep, "agent": "wandb"})
    return RunRecord(wandb_id=secrets.token_hex(4))


def rewrite(config: Config, record: RunRecord) -> None:
    """Write a run's config and record, each whole or not at all."""
    _write(config.directory / CONFIG, to_yaml(config))
    _write_record(config.directory, record)


def agreed(config: Config) -> Config:
    """The config as what lies in its directory allows it. Writes nothing. Raises ConfigError if it is another run."""
    directory = config.directory
    if (directory / CONFIG).exists() and (directory / STARTED).exists():
        frozen = read_config(directory / CONFIG)
        other = differences(config, frozen)
        if other:
            raise ConfigError(
                f"run.id = {config.run.id} is another run: {'; '.join(other)}; choose a new run.id, or these values"
            )
        config = _filled(config, frozen)
    elif (
        directory.is_dir()
        and not (directory / CONFIG).exists()
        and any(not path.name.startswith(".") for path in directory.iterdir())
    ):
        raise ConfigError(f"{directory} holds no run but other files; choose another run.id or run.dir")
    return _filled(config, config)


def joined(config: Config) -> Config:
    """The config as a node has it that does not lead: no judge of the directory, which it may see half-written."""
    directory = config.directory
    if (directory / CONFIG).exists() and (directory / STARTED).exists():
        config = _filled(config, read_config(directory / CONFIG))
    return _filled(config, config)


def _filled(config: Config, frozen: Config) -> Config:
    """The config with what it leaves open: as the frozen one of an earlier start has it, or as it is from now on."""
    threads = config.trainer.threads or frozen.trainer.threads or _threads(config)
    epochs = config.schedule.epochs or frozen.schedule.epochs
    if config.schedule.form != "exponential":
        epochs = epochs or config.trainer.max_epochs
    return completed(config, trainer={"threads": threads}, schedule={"epochs": epochs})


def _threads(config: Config) -> int:
    """Cores of a process, where nobody has said. Those of a node of Slurm are not the ones of this machine."""
    if config.cluster.launcher == "slurm":
        return config.slurm.cpus_per_task or 1
    return max(1, (os.cpu_count() or 1) // config.cluster.devices)


def worker_count(config: Config, *, cuda: bool) -> int:
    """Decoding processes of a rank. cuda: it trains on a GPU."""
    if config.cluster.workers >= 0:
        return config.cluster.workers
    # On CPU the training takes every core. With a GPU a core is left to the process that feeds it.
    granted = config.slurm.cpus_per_task if config.cluster.launcher == "slurm" else 0
    cores = granted or (os.cpu_count() or 1) // config.cluster.devices
    return max(1, cores - 1) if cuda else 0


def begin_run(config: Config, **facts: str) -> None:
    """Note a start in run.json. Raises ConfigError if the starts before it all failed and got no further."""
    directory = config.directory
    try:
        record = read_record(directory)
        step = newest_step(directory)
        refuse_crash_loop(config, record, step)
        now = datetime.now(tz=UTC).isoformat(timespec="seconds")
        record.starts.append({"at": now, "step": step, **_circumstance(config), **facts})
        _write_record(directory, record)
        (directory / STOPPED).unlink(missing_ok=True)  # whoever starts it wants it to go on
    except OSError as error:
        raise _unwritable(config, error) from None


def close_run(directory: Path, ended: str) -> None:
    """Note how the last start ended: done, interrupted or failed. One that was killed notes nothing."""
    record = read_record(directory)
    record.starts[-1]["ended"] = ended
    record.starts[-1]["ended_at"] = datetime.now(tz=UTC).isoformat(timespec="seconds")
    _write_record(directory, record)


def note_start(directory: Path, **facts: str) -> list[str]:
    """Note on what this start computes; returns in what it differs from the last one that noted it, a line each."""
    record = read_record(directory)
    before = [start for start in record.starts[:-1] if facts.keys() & start.keys()]
    record.starts[-1].update(facts)
    _write_record(directory, record)
    last = before[-1] if before else {}
    return [f"{name} {value}, before {last[name]}" for name, value in facts.items() if last.get(name, value) != value]


def add_to_start(directory: Path, **facts: object) -> None:
    """Note more about the last start."""
    record = read_record(directory)
    record.starts[-1].update(facts)
    _write_record(directory, record)


def numbered_checkpoints(directory: Path) -> dict[int, Path]:
    """A run's checkpoints by their steps, as their names have them."""
    found = {path.stem.partition("-")[2]: path for path in (directory / "checkpoints").glob("step-*.ckpt")}
    return {int(step): path for step, path in found.items() if step.isdigit()}


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint; 0 for none."""
    return max(numbered_checkpoints(directory), default=0)


def failed_in_a_row(starts: Sequence[Mapping[str, object]], step: int) -> int:
    """How many of the last starts failed, each begun at this step."""
    count = 0
    for start in reversed(starts):
        if start.get("ended") in ("done", "interrupted") or start.get("step", 0) != step:
            break
        count += 1
    return count


def refuse_crash_loop(config: Config, record: RunRecord, step: int) -> None:
    """Raises ConfigError where the last starts of a run all failed at this step."""
    allowed = config.run.stalled_starts
    if allowed and failed_in_a_row(record.starts, step) >= allowed:
        raise ConfigError(
            f"{config.run.id} failed {allowed} times in a row after step {step} and never got further: it would again; "
            f"see {config.directory / 'logs'} and what it printed, mend the cause, and go on once with "
            "run.stalled_starts=0"
        )


def _unwritable(config: Config, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.dir = {config.run.dir}: {error.strerror} ({error.filename}); choose a directory that can be written"
    )


def _write_record(directory: Path, record: RunRecord) -> None:
    _write(directory / RECORD, json.dumps(asdict(record), indent=2) + "\n")


def _circumstance(config: Config) -> dict[str, object]:
    """Where this start of the run happens."""
    return {
        "world": config.world,
        "nodes": config.cluster.nodes,
        "accelerator": config.cluster.accelerator,
        "workers": config.cluster.workers,
        "micro_batch_size": config.data.micro_batch_size,
        "max_epochs": config.trainer.max_epochs,
        "max_steps": config.trainer.max_steps,
        "on_nan": config.trainer.on_nan,
        "spike_factor": config.trainer.spike_factor,
    }


def read_record(directory: Path) -> RunRecord:
    """The run.json of a run. Raises ConfigError if it is none."""
    try:
        return RunRecord(**json.loads((directory / RECORD).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{directory / RECORD}: {error}; it is needed to go on in the same W&B run") from None


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
