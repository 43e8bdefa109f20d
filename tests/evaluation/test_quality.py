"""Class by class, confusions and calibration, against values by hand and against other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.evaluation.quality import (
    ClassScore,
    Confusion,
    accuracy_by_coverage,
    answers,
    by_class,
    calibration,
    confusions,
    hits,
)
from pipeline.evaluation.truth import one_label, several_labels

PROBABILITY_NK = np.array([
    [0.7, 0.2, 0.1],  # 0, right
    [0.1, 0.3, 0.6],  # 1, taken for 2
    [0.2, 0.5, 0.3],  # 2, taken for 1
    [0.3, 0.6, 0.1],  # 2, taken for 1
])  # fmt: skip
LABEL_N = np.array([0, 1, 2, 2])


def drawn(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(classes, 0.3), images), rng.integers(0, classes, images)


def test_one_label_is_right_where_it_is_the_first_answer():
    found = hits(PROBABILITY_NK, one_label(LABEL_N, 3))
    assert found.top1_N.tolist() == [True, False, False, False]
    assert found.top5_N.tolist() == [True, True, True, True]  # three classes: five answers are all of them


def test_of_several_labels_any_is_right_and_an_image_without_one_does_not_count():
    truth = several_labels(LABEL_N, [[0], [1, 2], [], [0]], 3)
    assert truth.counted_N.tolist() == [True, True, False, True]
    assert hits(PROBABILITY_NK, truth).top1_N.tolist() == [True, True, False]


def test_one_label_and_a_list_of_one_are_the_same_truth():
    one, several = one_label(LABEL_N, 3), several_labels(LABEL_N, [[label] for label in LABEL_N.tolist()], 3)
    np.testing.assert_array_equal(one.accepted_NK, several.accepted_NK)


@pytest.mark.parametrize("labels", [[-1, 0], [0, 3]])
def test_a_label_outside_the_classes_is_named(labels):
    with pytest.raises(ValueError, match=rf"label {next(x for x in labels if x)} lies outside the 3 classes"):
        one_label(np.array(labels), 3)


def test_equal_probabilities_go_to_the_smaller_class():
    assert answers(np.array([[0.25, 0.25, 0.25, 0.25]]), 2).tolist() == [[0, 1]]


def test_a_class_has_its_recall_and_its_precision():
    zero, one, two = by_class(PROBABILITY_NK, one_label(LABEL_N, 3))
    assert zero == ClassScore(0, images=1, right=1, right_of_five=1, answered=1, answered_rightly=1)
    assert (one.recall, one.precision) == (0.0, 0.0)  # answered twice, wrongly
    assert (two.images, two.answered) == (2, 1)
    absent = by_class(PROBABILITY_NK[:1], one_label(LABEL_N[:1], 3))[2]
    assert math.isnan(absent.recall)
    assert math.isnan(absent.precision)


def test_classes_add_up_to_the_whole():
    probability_NK, label_N = drawn(500, 17)
    truth = one_label(label_N, 17)
    scores, found = by_class(probability_NK, truth), hits(probability_NK, truth)
    assert sum(s.images for s in scores) == sum(s.answered for s in scores) == 500
    assert sum(s.right for s in scores) == sum(s.answered_rightly for s in scores) == found.top1_N.sum()
    assert sum(s.right_of_five for s in scores) == found.top5_N.sum()
    assert sum(c.images for c in confusions(probability_NK, truth)) == 500 - found.top1_N.sum()


def test_confusions_come_with_the_most_images_first():
    assert confusions(PROBABILITY_NK, one_label(LABEL_N, 3)) == [Confusion(2, 1, 2, 1.0), Confusion(1, 2, 1, 1.0)]


def test_confusions_are_those_of_scikit_learn():
    from sklearn.metrics import confusion_matrix

    probability_NK, label_N = drawn(400, 9)
    expected = confusion_matrix(label_N, probability_NK.argmax(1), labels=range(9))
    np.fill_diagonal(expected, 0)
    found = np.zeros_like(expected)
    for each in confusions(probability_NK, one_label(label_N, 9)):
        found[each.label, each.taken_for] = each.images
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_torchmetrics(bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    probability_NK, label_N = drawn(2000, 6)
    for norm, name in (("l1", "error"), ("max", "largest")):
        expected = multiclass_calibration_error(
            torch.from_numpy(probability_NK), torch.from_numpy(label_N), num_classes=6, n_bins=bins, norm=norm
        )
        found = getattr(calibration(probability_NK, one_label(label_N, 6), bins), name)
        assert found == pytest.approx(float(expected), abs=1e-6)


def test_loss_and_brier_score_are_those_of_scikit_learn():
    from sklearn.metrics import log_loss

    probability_NK, label_N = drawn(300, 5)
    found = calibration(probability_NK, one_label(label_N, 5))
    assert found.nll == pytest.approx(log_loss(label_N, probability_NK, labels=range(5)), rel=1e-12)
    assert found.brier == pytest.approx(np.square(probability_NK - np.eye(5)[label_N]).sum(1).mean(), rel=1e-12)


def test_confidence_that_is_earned_has_no_error():
    probability_NK = np.tile([0.75, 0.25], (4, 1))
    assert calibration(probability_NK, one_label(np.array([0, 0, 0, 1]), 2)).error == 0
    assert calibration(probability_NK, one_label(np.array([1, 1, 1, 1]), 2)).error == 0.75


def test_confidence_of_0_and_of_1_have_bins():
    found = calibration(np.array([[1.0, 0.0], [0.0, 1.0]]), one_label(np.array([0, 0]), 2))
    assert found.images_B.tolist() == [0] * 14 + [2]
    assert found.nll == pytest.approx(-math.log(np.finfo(float).tiny) / 2)  # large, and finite


def test_coverage_ends_at_the_accuracy_of_all():
    probability_NK, label_N = drawn(250, 4)
    truth = one_label(label_N, 4)
    share, accuracy = accuracy_by_coverage(probability_NK, truth)
    assert share[-1] == 1
    assert accuracy[-1] == hits(probability_NK, truth).top1_N.mean()
    assert (np.diff(share) > 0).all()


def test_images_of_one_confidence_are_kept_together():
    share, accuracy = accuracy_by_coverage(np.tile([0.6, 0.4], (3, 1)), one_label(np.array([0, 1, 1]), 2))
    assert share.tolist() == [1.0]
    assert accuracy.tolist() == [pytest.approx(1 / 3)]


def test_nothing_to_count_is_no_number_and_no_error():
    truth = several_labels(LABEL_N, [[], [], [], []], 3)
    assert math.isnan(calibration(PROBABILITY_NK, truth).error)
    assert confusions(PROBABILITY_NK, truth) == []
    assert len(hits(PROBABILITY_NK, truth).top1_N) == 0
