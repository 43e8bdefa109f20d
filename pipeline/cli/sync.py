"""pipeline sync: what W&B lacks of runs, sent from where they lie."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.codes import DONE, FAILED, RESUMABLE, code_of, line_of
from pipeline.cli.options import add_verb, seconds
from pipeline.cli.runs import of_run

if TYPE_CHECKING:
    from pipeline.callbacks.wandb_server import WandbPlace
    from pipeline.config import Config
    from pipeline.launch.plan import RunRecord


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = add_verb(
        verbs, "sync", sync, "send W&B what it lacks of runs: offline segments in order and each once, single rows, "
        "artifacts",
        "pipeline sync runs/first --timeout 120\n"
        "  pipeline sync runs/* --dry-run\n"
        "  pipeline sync runs/first tracking.artifacts=files",
    )  # fmt: skip
    p.add_argument("words", nargs="+", metavar="RUN | key=value", help="directories of runs, and keys to change")
    p.add_argument("--timeout", type=seconds, default=600.0, metavar="SECONDS", help="for each run (default: 600)")
    p.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")


def sync(options: argparse.Namespace) -> int:
    from pipeline.config import ConfigError

    overrides = [word for word in options.words if "=" in word and not Path(word).exists()]
    runs = [Path(word) for word in options.words if word not in overrides]
    if not runs:
        raise ConfigError("there is no run to send; give directories like runs/NAME")
    worst = DONE
    for run in runs:
        try:
            _sync_one(run, overrides, options)
        except Exception as error:
            code = code_of(error)
            if code is None or len(runs) == 1:
                raise
            print(f"pipeline: {line_of(error)}", file=sys.stderr)  # and on with the others
            worst = worst or code
    return worst


def _sync_one(directory: Path, overrides: list[str], options: argparse.Namespace) -> None:
    from pipeline.callbacks.artifacts import artifacts
    from pipeline.callbacks.sync import synchronize
    from pipeline.config import ConfigError
    from pipeline.launch.lock import locked
    from pipeline.launch.plan import CONFIG, RECORD, read_record

    if not ((directory / CONFIG).is_file() and (directory / RECORD).is_file()):
        raise ConfigError(f"{directory} is no run: it holds no {CONFIG}; give directories like runs/NAME")
    config, record = of_run(directory / CONFIG, overrides), read_record(directory)
    place = place_of(config, record)
    if config.tracking.mode == "disabled":
        print(f"{directory}: not sent, for it was made with tracking.mode = disabled; to send it all the same, add "
              "tracking.mode=offline")  # fmt: skip
        return
    if not record.starts:
        print(f"{directory}: nothing to send, it has not begun")
        return
    code = {"done": DONE, "interrupted": RESUMABLE}.get(str(record.starts[-1].get("ended")), FAILED)
    kept = artifacts(directory, place.id, config.run.data, config.tracking.artifacts, place.where)
    with locked(directory):  # the segment of a run that goes on is still being written
        synchronize(
            directory, place, seconds=options.timeout, exit_code=code, artifacts=kept,
            dry_run=options.dry_run,
        )  # fmt: skip


def place_of(config: Config, record: RunRecord) -> WandbPlace:
    """Where a run belongs in W&B."""
    from pipeline.callbacks.wandb_server import WandbPlace

    return WandbPlace(
        id=record.wandb_id, name=config.run.id, project=config.tracking.project, entity=config.tracking.entity,
        group=config.tracking.group, tags=config.tracking.tags, sweep=record.sweep.get("id"),
    )  # fmt: skip
