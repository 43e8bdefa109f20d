"""How good predictions are beyond one number: class by class, what is taken for what, and whether confidence is earned.

Everything is of probabilities (N, K) and a Truth; images that do not count are left out.
Legend: N images, K classes, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.truth import Truth

BINS = 15  # Guo et al. 2017
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hits:
    """Which of the images that count are right: by the first answer, and by one of the first five."""

    top1_N: NDArray[np.bool_]
    top5_N: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class: its images, how many of them are right, and how often it is answered, rightly and at all."""

    label: int
    images: int
    right: int
    right_of_five: int
    answered: int
    answered_rightly: int

    @property
    def recall(self) -> float:
        return self.right / self.images if self.images else float("nan")

    @property
    def precision(self) -> float:
        return self.answered_rightly / self.answered if self.answered else float("nan")


@dataclass(frozen=True, slots=True)
class Confusion:
    """Images of one class that were taken for another. share: of the class's images."""

    label: int
    taken_for: int
    images: int
    share: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence against accuracy. error: ECE, the mean of their distance over images, in B bins of equal width.

    largest: the distance of the worst bin. nll, brier: of the probability that is given to right answers, per image.
    """

    error: float
    largest: float
    nll: float
    brier: float
    confidence_B: Floats  # mean in each bin, NaN for an empty one
    accuracy_B: Floats
    images_B: NDArray[np.int64]


def hits(probability_NK: NDArray[np.floating], truth: Truth) -> Hits:
    """Of the images that count, in their order. Of equal probabilities the smaller class comes first."""
    counted_N = truth.counted_N
    probability_NK, accepted_NK = probability_NK[counted_N], truth.accepted_NK[counted_N]
    best_N5 = answers(probability_NK, 5)
    right_N5: NDArray[np.bool_] = np.take_along_axis(accepted_NK, best_N5, axis=1)
    right_N5 &= ~np.isnan(np.take_along_axis(probability_NK, best_N5, axis=1))  # what is no number is no answer
    return Hits(right_N5[:, 0].copy(), np.asarray(right_N5.any(1)))


def answers(probability_NK: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The most probable classes of each image, best first; of equals the smaller number."""
    left_NK, rows = probability_NK.copy(), np.arange(len(probability_NK))
    best = []
    for _ in range(min(count, probability_NK.shape[1])):  # 0.4 s for 50,000 images of 1,000 classes; to sort takes 4
        best.append(left_NK.argmax(1))
        left_NK[rows, best[-1]] = -np.inf
    return np.stack(best, axis=1)


def by_class(probability_NK: NDArray[np.floating], truth: Truth) -> list[ClassScore]:
    """One score for each class, in the order of the labels."""
    counted_N = truth.counted_N
    label_N, classes = truth.label_N[counted_N], probability_NK.shape[1]
    found = hits(probability_NK, truth)
    first_N = answers(probability_NK[counted_N], 1)[:, 0]
    columns = (
        np.bincount(label_N, minlength=classes),
        np.bincount(label_N, weights=found.top1_N, minlength=classes),
        np.bincount(label_N, weights=found.top5_N, minlength=classes),
        np.bincount(first_N, minlength=classes),
        np.bincount(first_N, weights=found.top1_N, minlength=classes),
    )
    return [ClassScore(label, *(int(column[label]) for column in columns)) for label in range(classes)]


def confusions(probability_NK: NDArray[np.floating], truth: Truth) -> list[Confusion]:
    """What is taken for what, most images first; of a class and an answer that is not right."""
    counted_N = truth.counted_N
    label_N, classes = truth.label_N[counted_N], probability_NK.shape[1]
    wrong_N = ~hits(probability_NK, truth).top1_N
    first_N = answers(probability_NK[counted_N], 1)[:, 0]
    images_K = np.bincount(label_N, minlength=classes)
    pairs, counts = np.unique(label_N[wrong_N] * classes + first_N[wrong_N], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        Confusion(int(pair) // classes, int(pair) % classes, int(count), float(count / images_K[int(pair) // classes]))
        for pair, count in zip(pairs[order], counts[order], strict=True)
    ]


def calibration(probability_NK: NDArray[np.floating], truth: Truth, bins: int = BINS) -> Calibration:
    """Guo et al. 2017, section 2: bins of confidence ((b - 1) / B, b / B]; all NaN where no image counts."""
    counted_N = truth.counted_N
    probability_NK, accepted_NK = probability_NK[counted_N].astype(np.float64), truth.accepted_NK[counted_N]
    right_N = hits(probability_NK, Truth(truth.label_N[counted_N], accepted_NK)).top1_N
    confidence_N = probability_NK.max(1, initial=0.0)
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    images_B = np.bincount(bin_N, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        confidence_B = np.bincount(bin_N, weights=confidence_N, minlength=bins) / images_B
        accuracy_B = np.bincount(bin_N, weights=right_N, minlength=bins) / images_B
    if not len(confidence_N):
        unknown = float("nan")
        return Calibration(unknown, unknown, unknown, unknown, confidence_B, accuracy_B, images_B)
    distance_B = np.where(images_B > 0, np.abs(np.nan_to_num(accuracy_B - confidence_B)), 0.0)
    # Several right answers share one target, each the same part of it.
    target_NK = accepted_NK / accepted_NK.sum(1, keepdims=True)
    given_N = (probability_NK * accepted_NK).sum(1)
    return Calibration(
        error=float((distance_B * images_B).sum() / len(confidence_N)),
        largest=float(distance_B.max()),
        nll=float(-np.log(np.maximum(given_N, np.finfo(np.float64).tiny)).mean()),
        brier=float(np.square(probability_NK - target_NK).sum(1).mean()),
        confidence_B=confidence_B, accuracy_B=accuracy_B, images_B=images_B,
    )  # fmt: skip


def accuracy_by_coverage(probability_NK: NDArray[np.floating], truth: Truth) -> tuple[Floats, Floats]:
    """(share of images kept, accuracy among them), from the most confident image to all: what abstaining would gain.

    Images of one confidence come and go together: the order in which they lie says nothing.
    """
    counted_N = truth.counted_N
    right_N = hits(probability_NK, truth).top1_N
    confidence_N = probability_NK[counted_N].max(1, initial=0.0)
    order = np.argsort(-confidence_N, kind="stable")
    last = np.flatnonzero(np.diff(confidence_N[order], append=-1.0) != 0)
    kept_X = last + 1.0
    return kept_X / max(len(right_N), 1), np.cumsum(right_N[order])[last] / kept_X
