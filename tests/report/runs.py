"""Runs that never ran: directories as a run leaves them, with times and values chosen by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from pipeline.callbacks.journal import Journal, Row

BEGAN = 1_790_000_000.0  # seconds since 1970; a whole second, as run.json keeps them


def moment(seconds: float) -> str:
    """So many seconds after the beginning, as run.json writes it."""
    return datetime.fromtimestamp(BEGAN + seconds, tz=UTC).isoformat(timespec="seconds")


def start(at: float, step: int = 0, ended: str | None = "done", until: float | None = None, **more: Any) -> dict:
    noted = {"at": moment(at), "step": step, "world": 2, "nodes": 1, "device": "cpu", "torch": "2.15.0", **more}
    if ended is not None:
        noted |= {"ended": ended, "ended_at": moment(until)}
    return noted


def train(step: int, at: float, *, seconds: float, span: float = 10.0, **more: Any) -> Row:
    shares = {"data_wait": 0.1, "statistics_wait": 0.05, "gradient_wait": 0.1, "checkpoint_wait": 0.0} | more
    loss = shares.pop("loss", 1.0)
    return Row(step=step, epoch=step / 10, split="train", loss=loss, top1=0.5, top5=0.9, images=100, rate=0.1,
               images_per_s=100 / span, seconds=seconds, span=span, at=BEGAN + at, ranks=2, nodes=1,
               **shares)  # fmt: skip


def val(step: int, top1: float, at: float, *, seconds: float = 0.0, span: float = 0.0) -> Row:
    return Row(step=step, epoch=step / 10, split="val", loss=1 - top1, top1=top1, top5=1.0, images=50,
               seconds=seconds, span=span, at=BEGAN + at)  # fmt: skip


def make_run(
    directory: Path, rows: Sequence[Row] = (), starts: Sequence[Mapping[str, Any]] = (), **config: Any
) -> Path:
    """A run's directory. config: keys beside those that every run has."""
    directory.mkdir(parents=True)
    content = {"schema": 1, "seed": 0, "run": {"id": directory.name, "dir": str(directory.parent), "recipe": "bn_x5"},
               "data": {"global_batch_size": 4}, **config}  # fmt: skip
    (directory / "config.yaml").write_text(yaml.safe_dump(content))
    (directory / "run.json").write_text(json.dumps({"wandb_id": "abc", "starts": list(starts)}))
    if rows:
        journal = Journal(directory / "metrics.csv", from_step=0)
        for row in rows:
            journal.append(row)
        journal.close()
    return directory


def simple(directory: Path, best: float = 0.9, slowness: int = 1, **config: Any) -> Path:
    """A run of 40 steps that reaches its best at step 20 x slowness, or at its end."""
    rows = []
    for step in (10, 20, 30, 40):
        at = step * slowness
        rows.append(train(step, at, seconds=at - 5, loss=2 - step / 40))
        rows.append(val(step, best * min(step / (20 * slowness), 1), at + 1, seconds=at - 4, span=1.0))
    return make_run(directory, rows, [start(0, until=40 * slowness + 5)], **config)
