import numpy as np
import pytest

from pipeline.evaluation.ensemble import compare, mean_of
from pipeline.evaluation.predictions import Predictions, PredictionsError
from pipeline.evaluation.truth import Truth, several_labels

LABELS = np.arange(6) % 3


def member(seed: int, samples: np.ndarray | None = None) -> Predictions:
    probability = np.random.default_rng(seed).dirichlet(np.ones(3), 6).astype(np.float32)
    whole = Predictions(np.arange(6), [f"k{s}" for s in range(6)], LABELS, probability)
    return whole if samples is None else whole.only(samples)


def test_the_ensemble_is_the_arithmetic_mean_of_probabilities():
    members = [member(seed) for seed in range(4)]
    expected = np.mean([m.probability_NK.astype(np.float64) for m in members], axis=0)
    np.testing.assert_allclose(mean_of(members).probability_NK, expected, rtol=1e-7)


def test_members_that_err_on_other_images_make_a_better_ensemble():
    """Each of three is surely wrong on its own two images and sure enough of the others."""
    members = []
    for wrong in range(3):
        probability = np.full((6, 3), 0.1, dtype=np.float32)
        probability[np.arange(6), LABELS] = 0.8
        bad = wrong == LABELS
        probability[bad] = np.roll(probability[bad], 1, axis=1)
        members.append(Predictions(np.arange(6), list("abcdef"), LABELS, probability))
    found = compare(members)
    assert [m.top1.value for m in found.members] == pytest.approx([1 / 3] * 3)
    assert found.ensemble.top1.value == 0
    assert found.top1.value == pytest.approx(-1 / 3)
    assert found.top1.high <= 0
    assert found.best == 0


def test_an_image_that_any_member_could_not_read_counts_for_none():
    found = compare([member(0), member(1, np.array([0, 2, 3, 4, 5])), member(2, np.array([0, 1, 2, 3, 5]))])
    assert found.left_out == [1, 4]
    assert found.predictions.sample_N.tolist() == [0, 2, 3, 5]
    assert {m.images for m in [*found.members, found.ensemble]} == {4}
    few = [member(seed, np.array([0, 2, 3, 5])) for seed in range(3)]
    assert found.members == compare(few).members


def test_answers_that_are_accepted_beside_the_label_count_for_members_and_ensemble():
    members = [member(seed) for seed in range(3)]

    def anything(predictions: Predictions) -> Truth:
        return several_labels(predictions.label_N, [[0, 1, 2]] * 5 + [[]], 3)

    found = compare(members, anything)
    assert {m.images for m in [*found.members, found.ensemble]} == {5}  # the last has no right answer
    assert {m.top1.value for m in [*found.members, found.ensemble]} == {0.0}


def test_members_of_other_images_or_classes_are_refused():
    other = member(1)
    relabelled = Predictions(other.sample_N, other.key, (LABELS + 1) % 3, other.probability_NK)
    with pytest.raises(PredictionsError, match="has other labels"):
        compare([member(0), relabelled])
    fewer = Predictions(other.sample_N, other.key, LABELS % 2, other.probability_NK[:, :2])
    with pytest.raises(PredictionsError, match=r"members of \[3, 2\] classes"):
        compare([member(0), fewer])
