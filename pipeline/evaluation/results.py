"""What an evaluation has found so far, on disk: an interrupted one goes on where it was, on any number of ranks.

    DIR/settings.json     what was evaluated, and how: nothing else may be added to it
    DIR/statistics.npz    the population statistics that it began with
    DIR/part-*.npz        blocks of images, whole or absent; removed when all is put together
    DIR/predictions.npz   all of it (predictions.py)

No rank waits for another: each writes parts of its own, and the leading one sees by their files how far all are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.predictions import Predictions, PredictionsError, read_arrays, write_arrays

SETTINGS, STATISTICS, PREDICTIONS = "settings.json", "statistics.npz", "predictions.npz"
_FORMAT = "pipeline-evaluation/1"


def digest_of(settings: Mapping[str, Any]) -> str:
    """Names an evaluation: the hash of all that it depends on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Results:
    """The directory of one evaluation. Raises PredictionsError where it holds another one, OSError where it cannot be.

    settings: all that the results depend on, as plain values. images: how many there are in all.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], images: int):
        self.directory, self.images = directory, images
        self.settings = {"format": _FORMAT, **settings}
        self.digest = digest_of(self.settings)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / SETTINGS
        if path.exists():
            self._check(path)
        else:
            _write(path, json.dumps(self.settings, indent=2) + "\n")

    @property
    def predictions(self) -> Predictions | None:
        """All of them, where the evaluation is complete. Raises PredictionsError."""
        path = self.directory / PREDICTIONS
        return Predictions.load(path) if path.exists() else None

    def blocks(self) -> dict[int, Path]:
        """Blocks that are done, and the part in which each is. Raises PredictionsError for a part of something else."""
        return {int(block): path for path in self._parts() for block in self._read(path, ("block",))["block"]}

    def count(self) -> int:
        """Images in the parts so far, by the names of their files."""
        return sum(int(path.stem.rpartition("-")[2]) for path in self._parts())

    def add(self, blocks: Mapping[int, int], predictions: Predictions, faults: Iterable[Mapping[str, Any]]) -> None:
        """Write a part. blocks: its numbers, with how many images each has, bad ones included. Raises OSError."""
        columns = {**predictions.columns(), "block": np.array(list(blocks)), "settings": _text(self.digest),
                   "faults": _text(json.dumps(list(faults)))}  # fmt: skip
        write_arrays(self.directory / f"part-{min(blocks):08d}-{sum(blocks.values())}.npz", columns)

    def put_together(self) -> tuple[Predictions, list[dict[str, Any]]]:
        """All images and what was wrong with those that are left out, of the parts. Raises PredictionsError."""
        found, faults = list[Predictions](), dict[int, dict[str, Any]]()
        seen: set[int] = set()
        for path in self._parts():
            columns = self._read(path)
            blocks = {int(block) for block in columns["block"]}
            if blocks <= seen:  # ranks that saw an old state of the directory did them twice
                continue
            part = Predictions.of(columns, str(path))
            known = np.concatenate([each.sample_N for each in found]) if found else np.array([], dtype=np.int64)
            found.append(part.only(np.setdiff1d(part.sample_N, known)))
            seen |= blocks
            faults |= {fault["sample"]: fault for fault in json.loads(str(columns["faults"]))}
        predictions = Predictions.merged(found)
        missing = self.images - len(predictions) - len(faults)
        if missing:
            raise PredictionsError(
                f"{self.directory} lacks {missing} of {self.images} images; evaluate again to add them"
            )
        return predictions, [faults[sample] for sample in sorted(faults)]

    def finish(self, predictions: Predictions) -> None:
        """Keep all of it in one file. Raises OSError."""
        predictions.save(self.directory / PREDICTIONS)

    def tidy(self) -> None:
        """Remove the parts, when all that is made of them is on disk: before, a kill may need them again."""
        for path in [*self._parts(), *self.directory.glob(".part-*.tmp")]:  # of processes that were killed
            path.unlink(missing_ok=True)

    def save_statistics(self, values: NDArray[np.float64]) -> None:
        write_arrays(self.directory / STATISTICS, {"values": values, "settings": _text(self.digest)})

    def statistics(self) -> NDArray[np.float64] | None:
        """What was saved of them, or None. Raises PredictionsError."""
        path = self.directory / STATISTICS
        return self._read(path)["values"].astype(np.float64, casting="safe") if path.exists() else None

    def _parts(self) -> list[Path]:
        return sorted(self.directory.glob("part-*.npz"))

    def _read(self, path: Path, only: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
        columns = read_arrays(path, (*only, "settings") if only else ())
        if str(columns.get("settings")) != self.digest:
            raise PredictionsError(f"{path} belongs to another evaluation than {self.directory / SETTINGS} describes; "
                                   "remove it")  # fmt: skip
        return columns

    def _check(self, path: Path) -> None:
        try:
            there = json.loads(path.read_text())
            unlike = [key for key in {**self.settings, **there} if self.settings.get(key) != there.get(key)]
        except (ValueError, TypeError):
            raise PredictionsError(f"{path} is damaged; remove {self.directory} and evaluate again") from None
        if unlike:
            said = ", ".join(f"{key} = {there.get(key)!r}, here {self.settings.get(key)!r}" for key in unlike[:3])
            raise PredictionsError(f"{self.directory} holds another evaluation ({said}); move it away")


class Buffer:
    """Blocks of this rank that are not on disk yet. Written when the oldest of them is `seconds` old, and by `flush`.

    The longer an evaluation takes, the fewer parts: never less than 5 s of work each, and 60 at most.
    """

    def __init__(self, results: Results):
        self.results = results
        self.blocks: dict[int, int] = {}
        self._predictions: list[Predictions] = []
        self._faults: list[Mapping[str, Any]] = []
        self._began = self._flushed = time.monotonic()

    @property
    def images(self) -> int:
        return sum(self.blocks.values())

    def add(self, block: int, predictions: Predictions, faults: Iterable[Mapping[str, Any]]) -> None:
        faults = list(faults)
        self._predictions.append(predictions)
        self._faults += faults
        self.blocks[block] = len(predictions) + len(faults)
        now = time.monotonic()
        if now - self._flushed > min(60.0, max(5.0, (now - self._began) / 50)):
            self.flush()

    def flush(self) -> None:
        """Write what there is, once. Raises OSError."""
        if not self.blocks:
            return
        # An interruption may come at any place here: what is written twice is the same part under the same name.
        self.results.add(self.blocks, Predictions.merged(self._predictions), self._faults)
        self.blocks, self._predictions, self._faults = {}, [], []
        self._flushed = time.monotonic()


def _text(value: str) -> NDArray[Any]:
    return np.array(value)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
