import numpy as np
import pytest

from pipeline.evaluation.intervals import paired_difference, wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe 1998, table I, method 3 (Wilson without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_values(count, total, low, high):
    interval = wilson(count, total)
    assert interval.value == count / total
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_within_0_and_1():
    for count in range(8):
        left, right = wilson(count, 7), wilson(7 - count, 7)
        assert (left.low, left.high) == pytest.approx((1 - right.high, 1 - right.low))
        assert 0 <= left.low <= left.value <= left.high <= 1


def test_of_no_images_nothing_is_known():
    assert wilson(0, 0) == (0.0, 0.0, 1.0)
    assert paired_difference(np.zeros(0, bool), np.zeros(0, bool)) == (0.0, 0.0, 0.0)


def columns(more: int, less: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    left = np.array([True] * more + [False] * less + [True] * both + [False] * neither)
    right = np.array([False] * more + [True] * less + [True] * both + [False] * neither)
    return left, right


def test_the_bootstrap_equals_one_that_draws_images():
    left, right = columns(30, 12, 100, 58)
    drawn = np.random.default_rng(0).integers(0, len(left), (20_000, len(left)))
    difference = (left[drawn].mean(1) - right[drawn].mean(1)).astype(float)
    found = paired_difference(left, right)
    assert found.value == pytest.approx(18 / 200)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(difference, [0.025, 0.975])), abs=0.006)


def test_the_bootstrap_agrees_with_the_normal_interval_for_many_images():
    left, right = columns(900, 600, 20_000, 3_500)
    total = len(left)
    found = paired_difference(left, right)
    half = 1.959964 * np.sqrt(1500 - 300**2 / total) / total
    assert (found.low, found.high) == pytest.approx((300 / total - half, 300 / total + half), abs=1e-4)


def test_what_does_not_differ_has_no_difference_and_seeds_are_fixed():
    left, right = columns(0, 0, 5, 5)
    assert paired_difference(left, right) == (0, 0, 0)
    left, right = columns(3, 1, 5, 5)
    assert paired_difference(left, right) == paired_difference(left, right)
    with pytest.raises(ValueError, match="not of the same images"):
        paired_difference(left, right[1:])
