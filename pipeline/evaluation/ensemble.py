"""Several networks' say on the same images: the arithmetic mean of their class probabilities, beside each of them.

So the paper's ensemble is (section 4.2.3); over views the mean was taken before (run/evaluating.py).
Legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.intervals import Interval, paired_difference, wilson
from pipeline.evaluation.predictions import Predictions, PredictionsError
from pipeline.evaluation.quality import Hits, hits
from pipeline.evaluation.truth import Truth, one_label


@dataclass(frozen=True, slots=True)
class Standing:
    """Shares of wrong images, with 95 % intervals. top5: the label is not among the five most probable classes."""

    images: int
    top1: Interval
    top5: Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """Members, in their order, and their mean, on the images that all of them saw.

    left_out: images that some member has and another lacks. best: place of the member with the least top-1 error, the
    first of equal ones. top1, top5: the ensemble's error minus that member's.
    """

    members: list[Standing]
    ensemble: Standing
    predictions: Predictions
    left_out: list[int]
    best: int
    top1: Interval
    top5: Interval


def compare(members: Sequence[Predictions], truth_of: Callable[[Predictions], Truth] | None = None) -> Comparison:
    """truth_of: what is right, where that is not each image's label alone; images that do not count are left out.

    Raises PredictionsError for members that do not speak of the same images and classes.
    """
    shared, left_out = _on_shared_images(members)
    mean = mean_of(shared)
    truth = truth_of(mean) if truth_of else one_label(mean.label_N, mean.classes)
    found = [hits(each.probability_NK, truth) for each in (*shared, mean)]
    standings = [_standing(each) for each in found]
    best = min(range(len(shared)), key=lambda place: standings[place].top1.value)
    top1 = paired_difference(~found[-1].top1_N, ~found[best].top1_N)
    top5 = paired_difference(~found[-1].top5_N, ~found[best].top5_N)
    return Comparison(standings[:-1], standings[-1], mean, left_out, best, top1, top5)


def mean_of(members: Sequence[Predictions]) -> Predictions:
    """The mean of the class probabilities of members with the same images, summed in float64 in their order."""
    total_NK = np.zeros(members[0].probability_NK.shape)
    for member in members:
        total_NK += member.probability_NK
    first = members[0]
    return Predictions(first.sample_N, first.key, first.label_N, (total_NK / len(members)).astype(np.float32))


def _standing(found: Hits) -> Standing:
    total = len(found.top1_N)
    top1, top5 = (wilson(total - int(right.sum()), total) for right in (found.top1_N, found.top5_N))
    return Standing(total, top1, top5)


def _on_shared_images(members: Sequence[Predictions]) -> tuple[list[Predictions], list[int]]:
    """Each member's images that all have, and the numbers of the others."""
    if len({member.classes for member in members}) > 1:
        classes = [member.classes for member in members]
        raise PredictionsError(f"members of {classes} classes have no mean; give networks of one data set")
    shared_N, all_N = members[0].sample_N, members[0].sample_N
    for member in members[1:]:
        shared_N, all_N = np.intersect1d(shared_N, member.sample_N), np.union1d(all_N, member.sample_N)
    shared = [member.only(shared_N) for member in members]
    for place, member in enumerate(shared[1:], 1):
        unlike = member.label_N != shared[0].label_N
        if member.key != shared[0].key or unlike.any():
            raise PredictionsError(f"member {place} speaks of other images than the first, or has other labels; give "
                                   "networks of one data set")  # fmt: skip
    return shared, np.setdiff1d(all_N, shared_N).tolist()
