"""What counts as right: one label an image, or several where people who looked again accept several.

Legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Truth:
    """label_N: the class that an image was filed under, int64. accepted_NK: every answer that is right.

    An image for which no answer is right is not counted: ReaL has 3,163 such (Beyer et al. 2020).
    """

    label_N: NDArray[np.int64]
    accepted_NK: NDArray[np.bool_]

    @property
    def counted_N(self) -> NDArray[np.bool_]:
        """Which images count."""
        return np.asarray(self.accepted_NK.any(1))


def one_label(label_N: NDArray[np.int64], classes: int) -> Truth:
    """Each image has its label alone. Raises ValueError for a label outside the classes."""
    _check(label_N, classes)
    accepted_NK = np.zeros((len(label_N), classes), dtype=np.bool_)
    accepted_NK[np.arange(len(label_N)), label_N] = True
    return Truth(label_N, accepted_NK)


def several_labels(label_N: NDArray[np.int64], accepted: Sequence[Sequence[int]], classes: int) -> Truth:
    """accepted: the right answers of each image, none for one that does not count. Raises ValueError likewise."""
    _check(label_N, classes)
    rows = np.repeat(np.arange(len(accepted)), [len(labels) for labels in accepted])
    flat = np.array([label for labels in accepted for label in labels], dtype=np.int64)
    _check(flat, classes)
    accepted_NK = np.zeros((len(label_N), classes), dtype=np.bool_)
    accepted_NK[rows, flat] = True
    return Truth(label_N, accepted_NK)


def _check(label_N: NDArray[np.int64], classes: int) -> None:
    outside = label_N[(label_N < 0) | (label_N >= classes)]
    if len(outside):
        raise ValueError(f"label {outside[0]} lies outside the {classes} classes, which run from 0 to {classes - 1}")
