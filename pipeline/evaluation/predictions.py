"""What a network said of each image of a set: class probabilities beside the label, whole or in parts, in .npz files.

Legend: N images, K classes.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLUMNS = ("sample", "key", "label", "probability", "loss")


class PredictionsError(ValueError):
    """Predictions that are none, or do not fit together: the message names file or field, rule and way out."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Images in the order of their numbers, each once. Raises PredictionsError where columns do not fit.

    sample_N: number of the image in its split. key: its name. probability_NK: the mean over its views.
    loss_N: as the network's own logits give it; absent, -log of the label's probability.
    """

    sample_N: NDArray[np.int64]
    key: list[str]
    label_N: NDArray[np.int64]
    probability_NK: NDArray[np.float32]
    loss_N: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        rows = {len(self.sample_N), len(self.key), len(self.label_N), len(self.probability_NK)}
        rows |= set() if self.loss_N is None else {len(self.loss_N)}
        if len(rows) > 1 or self.probability_NK.ndim != 2:
            raise PredictionsError(f"columns of {sorted(rows)} rows, probabilities of shape "
                                   f"{self.probability_NK.shape}; each column must have one row an image")  # fmt: skip
        if np.any(np.diff(self.sample_N) <= 0):
            raise PredictionsError("sample_N must rise from row to row; put parts together with `merged`")
        if len(self) and not 0 <= self.label_N.min() <= self.label_N.max() < self.classes:
            raise PredictionsError(f"labels from {self.label_N.min()} to {self.label_N.max()} lie outside the "
                                   f"{self.classes} classes that have a probability")  # fmt: skip

    def __len__(self) -> int:
        return len(self.sample_N)

    @property
    def classes(self) -> int:
        return int(self.probability_NK.shape[1])

    def losses(self) -> NDArray[np.float64]:
        """loss_N, or -log of the label's probability, which float32 bounds at 103."""
        if self.loss_N is not None:
            return self.loss_N
        own_N = self.probability_NK[np.arange(len(self)), self.label_N].astype(np.float64)
        return -np.log(np.maximum(own_N, np.finfo(np.float32).smallest_subnormal))

    def places(self) -> NDArray[np.int64]:
        """How many classes each image's label stands behind: 0 = it is the first.

        Of equal probabilities the class with the lower number comes first, on any device; one that is no number comes
        before all others, and before itself.
        """
        own_N1 = self.probability_NK[np.arange(len(self)), self.label_N][:, None]
        is_later = np.arange(self.classes) >= self.label_N[:, None]
        behind_NK = (self.probability_NK < own_N1) | ((self.probability_NK == own_N1) & is_later)
        return np.asarray((~behind_NK).sum(1), dtype=np.int64)

    def hits(self, k: int) -> NDArray[np.bool_]:
        """Whether each image's label is among the k most probable classes."""
        return self.places() < k

    def only(self, sample_N: NDArray[np.int64]) -> Predictions:
        """Those of the images that are among sample_N."""
        rows = np.flatnonzero(np.isin(self.sample_N, sample_N))
        return self._rows(rows)

    def columns(self) -> dict[str, NDArray[Any]]:
        """What a file holds of them, by name."""
        key = np.array([key.encode() for key in self.key], dtype=np.bytes_)
        columns: dict[str, NDArray[Any]] = {
            "sample": self.sample_N, "key": key, "label": self.label_N, "probability": self.probability_NK,
        }  # fmt: skip
        return columns if self.loss_N is None else {**columns, "loss": self.loss_N}

    def save(self, path: Path) -> None:
        """Write them whole or not at all. Raises OSError."""
        write_arrays(path, self.columns())

    @staticmethod
    def load(path: Path) -> Predictions:
        """Raises PredictionsError for what is no whole file of them, OSError where there is none."""
        return Predictions.of(read_arrays(path), str(path))

    @staticmethod
    def of(columns: Mapping[str, NDArray[Any]], where: str) -> Predictions:
        """Those of a file's columns. where: what messages call it. Raises PredictionsError."""
        try:
            sample, key, label, probability = (columns[name] for name in _COLUMNS[:4])
            return Predictions(
                sample.astype(np.int64, casting="safe"),
                [bytes(each).decode() for each in key],
                label.astype(np.int64, casting="safe"),
                probability.astype(np.float32, casting="same_kind"),
                columns["loss"].astype(np.float64, casting="safe") if "loss" in columns else None,
            )
        except (KeyError, TypeError, PredictionsError) as error:
            raise PredictionsError(f"{where} holds no predictions ({error}); remove it and evaluate again") from None

    @staticmethod
    def merged(parts: Sequence[Predictions]) -> Predictions:
        """All images of the parts, which share none. Raises PredictionsError where they do."""
        if len({part.classes for part in parts}) > 1:
            raise PredictionsError(
                f"parts of {sorted({part.classes for part in parts})} classes do not belong together"
            )
        sample_N = np.concatenate([part.sample_N for part in parts])
        order = np.argsort(sample_N, kind="stable")
        twice = np.flatnonzero(np.diff(sample_N[order]) == 0)
        if len(twice):
            raise PredictionsError(f"image {sample_N[order][twice[0]]} is in two parts; each must be in one")
        loss = [part.loss_N for part in parts if part.loss_N is not None]
        key = [key for part in parts for key in part.key]
        return Predictions(
            sample_N[order],
            [key[row] for row in order],
            np.concatenate([part.label_N for part in parts])[order],
            np.concatenate([part.probability_NK for part in parts])[order],
            np.concatenate(loss)[order] if len(loss) == len(parts) else None,
        )

    def _rows(self, rows: NDArray[np.int64]) -> Predictions:
        return Predictions(
            self.sample_N[rows],
            [self.key[row] for row in rows],
            self.label_N[rows],
            self.probability_NK[rows],
            None if self.loss_N is None else self.loss_N[rows],
        )


def write_arrays(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """An .npz file, whole or not at all: a temporary one, flushed to disk, then renamed. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **columns)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(path: Path, names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, all of them or those of names; nothing in it is run.

    Raises PredictionsError, or OSError where there is none.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files if name in names or not names}
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            why = str(error).partition("\n")[0]
            raise PredictionsError(
                f"{path} is torn, damaged or no .npz file ({why}); remove it and evaluate again"
            ) from None
