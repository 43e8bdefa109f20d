"""A run's segments in W&B's directory, one for each start, and the rows that each holds.

A segment is a directory [offline-]run-TIME-ID with a .wandb file: 7 bytes, then blocks of 32 KiB in LevelDB's log
format. Rows carry W&B's `_step` in our own coding, `position`: it grows along the journal, so that one number says how
far W&B is.

`wandb leet inspect --json` reads the files as well, in a process of 1 s and 0.1 ms a row, into a form that nobody
documents. Read here it takes 0.02 ms a row, and the tests hold one against the other.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from pipeline.callbacks.journal import Row
from pipeline.callbacks.metrics import METRICS, ONLY_IN_CSV, ONLY_IN_WANDB, wandb_name

_IDENTITY, _HEADER, _BLOCK = b":W&B", 7, 32768
_CHUNK = struct.Struct("<IHB")  # crc32 of kind and data, length, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4

Values = dict[str, Any]


def position(step: int, split: str) -> int:
    """W&B's _step of a row: a validation comes behind the training row of its step."""
    return 2 * step + (split == "val")


def values(row: Row) -> Values:
    """A row as W&B gets it, under our own step: what is known, by the names of metrics.py."""
    known = {metric: getattr(row, metric.name, None) for metric in METRICS if metric not in ONLY_IN_CSV}
    if row.images_per_s is not None:
        node, rank = ONLY_IN_WANDB
        known |= {node: _share(row.images_per_s, row.nodes), rank: _share(row.images_per_s, row.ranks)}
    return {wandb_name(metric, row.split): value for metric, value in known.items() if value is not None}


def _share(value: float, parts: float | None) -> float | None:
    return value / parts if parts else None


def position_of(row: Values) -> int:
    return position(row["step"], "val" if any(name.startswith("val/") for name in row) else "train")


@dataclass(frozen=True, slots=True)
class Segment:
    """One start of a run. path: its .wandb file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def is_offline(self) -> bool:
        return self.name.startswith("offline-")

    @property
    def marker(self) -> Path:
        """Made when the segment is uploaded; `wandb sync` looks for it, too."""
        return self.path.with_suffix(".wandb.synced")

    def rows(self) -> list[Values]:
        """What was flushed, without W&B's own values. What a killed process left half-written is left out."""
        found = []
        for record in _records(self.path.read_bytes()):
            message = wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined]
            if message.WhichOneof("record_type") == "history":
                row: Values = {}
                for item in message.history.item:
                    _put(row, list(item.nested_key) or [item.key], json.loads(item.value_json))
                if "step" in row:
                    found.append({name: value for name, value in row.items() if not name.startswith("_")})
        return found


def _put(row: Values, path: list[str], value: object) -> None:
    """At a path of keys: W&B's client takes a histogram apart into its type, values and bins."""
    *outer, name = path
    for key in outer:
        row = row.setdefault(key, {})
    row[name] = value


def segments(directory: Path, wandb_id: str) -> list[Segment]:
    """All segments of a run, in the order of their start. directory: the run's."""
    paths = [
        path
        for path in (directory / "wandb").glob(f"*run-*-{wandb_id}*/run-{wandb_id}.wandb")
        if not path.parent.is_symlink()
    ]
    return [Segment(path) for path in sorted(paths, key=lambda path: path.parent.name.removeprefix("offline-"))]


def last_position(directory: Path, wandb_id: str) -> int:
    """How far the segments reach together; -1 if they hold no row."""
    return max((position_of(row) for each in segments(directory, wandb_id) for row in each.rows()), default=-1)


def _records(data: bytes) -> Iterator[bytes]:
    """Whole records. Behind damage reading goes on at the next block, as W&B's own reader does."""
    if data[:4] != _IDENTITY:
        return
    at, parts, open_record = _HEADER, list[bytes](), False
    while at + _CHUNK.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK.size:
            at += left
            continue
        crc, length, kind = _CHUNK.unpack_from(data, at)
        chunk = data[at + _CHUNK.size : at + _CHUNK.size + length]
        is_sound = kind in (_WHOLE, _FIRST, _MIDDLE, _LAST) and _CHUNK.size + length <= left
        if not is_sound or zlib.crc32(data[at + _CHUNK.size - 1 : at + _CHUNK.size + length]) != crc:
            at, open_record = at + left, False
            continue
        at += _CHUNK.size + length
        if kind in (_WHOLE, _FIRST):
            parts, open_record = [], True
        parts.append(chunk)
        if kind in (_WHOLE, _LAST) and open_record:
            yield b"".join(parts)
            open_record = False
