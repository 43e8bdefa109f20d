"""What a run has left in its directory, as a report needs it: starts, rows, norms, config.

A run that is still going, one that was killed, and one of an older version lack some of it: what is there is read, and
`notes` says what is not. Legend: T rows of a table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipeline.callbacks.journal import Row, read_journal
from pipeline.callbacks.stragglers import FILE
from pipeline.launch.lock import LOCK, STALE_AFTER
from pipeline.report.ranks import Ranks, read_ranks

Values = NDArray[np.float64]
NORM_FIGURES = ("spread", "dead", "mean_drift", "variance_drift")
RUNNING, DONE, INTERRUPTED, FAILED, KILLED = "running", "done", "interrupted", "failed", "killed"


class NotARunError(Exception):
    """A path that no run's directory is; the message says what was looked for."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start. at, ended_at: seconds since 1970, the second None where nothing noted it. step: gone on from.

    ended: as RUNNING to KILLED. machines: each with its ranks. undone_step: how far the start before had come, where
    that was further.
    """

    at: float
    step: int
    ended: str
    ended_at: float | None
    ranks: int
    nodes: int
    device: str = ""
    torch: str = ""
    code: str = ""  # its commit, with a + where that was changed; or its digest
    machines: tuple[tuple[str, int], ...] = ()
    undone_step: int | None = None
    undone_at: float | None = None


@dataclass(frozen=True, slots=True)
class Norms:
    """steps: T looks. values: of each figure a table of looks and layers (T, layers); NaN where there is none."""

    steps: Values
    layers: list[str]
    values: dict[str, Values]


@dataclass(slots=True)
class Run:
    """One run. train, val: columns of metrics.csv by name, NaN where a row lacks a value.

    wandb_id: by which W&B knows it; "" where run.json does not say.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    starts: list[Start]
    train: dict[str, Values]
    val: dict[str, Values]
    norms: Norms | None = None
    ranks: Ranks = field(default_factory=Ranks)
    images: int = 0  # of the training split; 0 = not known
    wandb_id: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        return self.starts[-1].ended if self.starts else "not begun"

    @property
    def steps(self) -> int:
        """Steps of the newest row."""
        last = [table["step"][-1] for table in (self.train, self.val) if len(table["step"])]
        return int(max(last, default=0))


def read_run(path: Path) -> Run:
    """The run of a directory, or of the config.yaml in it. Raises NotARunError."""
    directory = path.parent if path.name == "config.yaml" else path
    config_file = directory / "config.yaml"
    if not config_file.is_file():
        raise NotARunError(f"{path} is no run: it holds no config.yaml; give a directory like runs/NAME")
    notes: list[str] = []
    try:
        content = yaml.load(config_file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise NotARunError(f"{config_file} is no config of a run; give a directory like runs/NAME")
    metrics = directory / "metrics.csv"
    rows: list[Row] = []
    try:
        rows = read_journal(metrics) if metrics.is_file() else []
    except (OSError, ValueError) as error:
        notes.append(f"metrics.csv cannot be read: {error}")
    if not rows and not notes:
        notes.append("metrics.csv has no row yet")
    return Run(
        name=directory.resolve().name,
        directory=directory,
        config=_flat(content),
        starts=_starts(directory, notes),
        train=_columns(row for row in rows if row.split == "train"),
        val=_columns(row for row in rows if row.split == "val"),
        norms=_norms(directory / "norms.csv"),
        ranks=read_ranks(directory / FILE),
        images=_images(directory / "dataset.json"),
        wandb_id=_wandb_id(directory / "run.json"),
        notes=notes,
    )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _columns(rows: Iterable[Row]) -> dict[str, Values]:
    """Rows as columns, in the order of steps."""
    listed = sorted(rows, key=lambda row: row.step)
    names = [name for name in Row.__slots__ if name != "split"]
    table = np.array([[_number(getattr(row, name)) for name in names] for row in listed], dtype=np.float64)
    return dict(zip(names, table.reshape(-1, len(names)).T, strict=True))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _starts(directory: Path, notes: list[str]) -> list[Start]:
    try:
        listed = json.loads((directory / "run.json").read_text())["starts"]
        found = [_start(each) for each in listed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        notes.append("run.json is missing or damaged: nothing is known of starts")
        return []
    if found and not listed[-1].get("ended") and _is_held(directory / LOCK):
        found[-1] = _start({**listed[-1], "ended": RUNNING})
    return found


def _start(noted: dict[str, Any]) -> Start:
    ended_at, undone = noted.get("ended_at"), noted.get("undone") or {}
    machines = noted.get("machines") or []
    return Start(
        at=_seconds(noted["at"]),
        step=int(noted.get("step", 0)),
        ended=str(noted.get("ended") or KILLED),
        ended_at=_seconds(ended_at) if ended_at else None,
        ranks=int(noted.get("world", 1)),
        nodes=int(noted.get("nodes", 1)),
        device=str(noted.get("device", "")),
        torch=str(noted.get("torch", "")),
        code=_code(noted),
        machines=tuple((str(each["machine"]), int(each["ranks"])) for each in machines),
        undone_step=undone.get("step"),
        undone_at=undone.get("at"),
    )


def _code(noted: dict[str, Any]) -> str:
    commit = str(noted.get("commit") or "")
    return commit[:9] + "+" * bool(noted.get("changed")) if commit else str(noted.get("code", ""))


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _is_held(lock: Path) -> bool:
    """Whether a process holds the run: its lock is touched every few seconds."""
    try:
        return time.time() - lock.stat().st_mtime < STALE_AFTER
    except OSError:
        return False


def _norms(path: Path) -> Norms | None:
    """norms.csv as tables; None without whole lines in it."""
    if not path.is_file():
        return None
    text = path.read_text(errors="replace")
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    names = header.split(",")
    if names != ["step", "layer", *NORM_FIGURES]:
        return None
    steps: dict[str, int] = {}
    layers: dict[str, int] = {}
    places, values = [], []
    for line in lines:
        parts = line.split(",")
        try:
            values.append([float(part) for part in parts[2:]])
        except ValueError:
            continue
        places.append((steps.setdefault(parts[0], len(steps)), layers.setdefault(parts[1], len(layers))))
    if not places:
        return None
    table = np.full((len(NORM_FIGURES), len(steps), len(layers)), np.nan)
    row_T, column_T = np.array(places).T
    table[:, row_T, column_T] = np.array(values).T
    return Norms(np.array([float(step) for step in steps]), list(layers),
                 dict(zip(NORM_FIGURES, table, strict=True)))  # fmt: skip


def _wandb_id(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["wandb_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _images(path: Path) -> int:
    try:
        return sum(int(shard["count"]) for shard in json.loads(path.read_text())["splits"]["train"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
