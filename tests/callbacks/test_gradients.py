"""A histogram of a gradient counts what is there, and says how heavy its tails are."""

import numpy as np
import pytest
import torch

from pipeline.callbacks.histogram import EDGES_E, VALUES, histogram


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_every_value_is_counted_once_and_zero_in_the_middle():
    found = histogram(torch.tensor([[0.0, 1e-11, -1e-12], [5e-3, -5e-3, 1e9]]))
    assert found.values == found.counts_B.sum() == 6
    middle = len(found.counts_B) // 2
    assert found.counts_B[middle] == 3
    assert found.counts_B[-1] == 1
    above, below = (np.flatnonzero((EDGES_E[:-1] <= x) & (EDGES_E[1:] > x))[0] for x in (5e-3, -5e-3))
    assert found.counts_B[above] == found.counts_B[below] == 1
    assert above - middle == middle - below


def test_tails_of_a_gaussian_are_those_of_the_books_and_those_of_laplace_are_heavier():
    gaussian = histogram(normal(40_000) * 1e-4)
    assert gaussian.deviation == pytest.approx(1e-4, rel=0.02)
    assert gaussian.kurtosis == pytest.approx(3, rel=0.05)
    assert gaussian.tail == pytest.approx(3.2905 / 0.6745, rel=0.05)
    laplace = histogram(torch.distributions.Laplace(0, 1).icdf(torch.linspace(1e-5, 1 - 1e-5, 40_000)))
    assert laplace.kurtosis == pytest.approx(6, rel=0.05)
    assert laplace.tail == pytest.approx(np.log(1000) / np.log(2), rel=0.02)


def test_scale_moves_a_histogram_and_leaves_its_shape():
    one, other = histogram(normal(9_999)), histogram(normal(9_999) * 1e-30)
    assert other.kurtosis == pytest.approx(one.kurtosis)
    assert other.tail == pytest.approx(one.tail)
    assert other.counts_B[len(other.counts_B) // 2] == 9_999


def test_a_gradient_of_zeros_has_no_tails_and_what_is_not_finite_is_left_out():
    assert np.isnan([histogram(torch.zeros(5)).kurtosis, histogram(torch.zeros(5)).tail]).all()
    assert histogram(torch.tensor([1.0, float("nan"), float("inf")])).counts_B.sum() == 1
    assert histogram(torch.zeros(0)).counts_B.sum() == 0


def test_of_a_large_layer_a_part_is_looked_at():
    found = histogram(normal(1000, 1000))
    assert found.values == 1_000_000
    assert VALUES / 2 < found.counts_B.sum() <= VALUES
    assert found.kurtosis == pytest.approx(3, rel=0.1)
