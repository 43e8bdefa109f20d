"""A run's directory before its first process: the frozen config and run.json, or the refusal to reuse it."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config import Config, ConfigError, completed, differences, read_config, to_yaml

CONFIG, RECORD = "config.yaml", "run.json"
STARTED = "metrics.csv"  # without it a run has not begun, and may still become another one


@dataclass(slots=True)
class RunRecord:
    """run.json: what must outlive processes. wandb_id: the run's place in W&B. starts: when and where."""

    wandb_id: str
    starts: list[dict[str, object]] = field(default_factory=list)


def new_run_id(config: Config) -> str:
    """recipe-data-time, for a run that was given no name."""
    return f"{config.run.recipe}-{config.run.data}-{datetime.now(tz=UTC):%Y%m%d-%H%M%S}"


def open_run(config: Config) -> Config:
    """Create the run's directory, or open an existing one to go on; returns the config to freeze.

    Raises ConfigError if the directory cannot be written, or holds a run that is another one.
    """
    if not config.run.id:
        config = completed(config, run={"id": new_run_id(config)})
        while config.directory.exists():  # another run began in this second
            config = completed(config, run={"id": f"{new_run_id(config)}-{secrets.token_hex(2)}"})
    directory = config.directory
    if (directory / CONFIG).exists() and (directory / STARTED).exists():
        frozen = read_config(directory / CONFIG)
        other = differences(config, frozen)
        if other:
            raise ConfigError(
                f"run.id = {config.run.id} is another run: {'; '.join(other)}; choose a new run.id, or these values"
            )
        config = completed(config, trainer={"threads": config.trainer.threads or frozen.trainer.threads})
    elif directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG).exists():
        raise ConfigError(f"{directory} holds no run but other files; choose another run.id or run.dir")
    if not config.trainer.threads:
        threads = max(1, (os.cpu_count() or 1) // config.cluster.devices)
        config = completed(config, trainer={"threads": threads})
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / CONFIG, to_yaml(config))
        record = read_record(directory) if (directory / RECORD).exists() else RunRecord(wandb_id=secrets.token_hex(4))
        record.starts.append({"at": datetime.now(tz=UTC).isoformat(timespec="seconds"), **_circumstance(config)})
        _write(directory / RECORD, json.dumps(asdict(record), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"run.dir = {config.run.dir}: {error.strerror} ({error.filename}); choose a directory that can be written"
        ) from None
    return config


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
