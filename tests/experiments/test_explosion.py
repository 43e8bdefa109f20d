"""Gradients grow by the factors that theory gives, through the product's own norm."""

import math

import numpy as np
import pytest

from pipeline.experiments.explosion import LAYERS, RELU_LIMIT, WIDTH, growth, linear_ratio, tell


@pytest.mark.parametrize("batch", [256, 1024])
def test_squared_gradients_of_rectifiers_grow_by_pi_over_pi_minus_one(batch):
    measured = float(np.mean([growth(batch, "relu", seed=seed) for seed in range(2)]))
    assert measured == pytest.approx(1.467, rel=0.02)


@pytest.mark.parametrize("batch", [16, 64])
def test_squared_gradients_of_linear_networks_grow_by_b_minus_two_over_b_minus_three(batch):
    measured = float(np.mean([growth(batch, None, seed=seed) for seed in range(3)]))
    assert measured == pytest.approx((batch - 2) / (batch - 3), rel=0.03)


def test_a_layer_is_measured_where_the_distribution_has_settled():
    assert len(growth(8, "relu", seed=0, width=32)) == LAYERS - 7


def test_three_images_have_no_finite_factor():
    with pytest.raises(ValueError, match="batch = 3"):
        linear_ratio(3)


def made(relu: float, linear_off: float) -> dict:
    return {
        "width": WIDTH,
        "layers": LAYERS,
        "growth": {
            "relu": {str(b): [[relu] * (LAYERS - 7)] * 2 for b in (16, 64, 256, 1024)},
            "linear": {str(b): [[linear_ratio(b) * linear_off] * (LAYERS - 7)] * 2 for b in (8, 16, 64, 256)},
        },
    }


def test_the_verdict_is_that_of_the_numbers():
    assert tell(made(RELU_LIMIT, 1.0)).holds is True
    assert tell(made(RELU_LIMIT * 1.03, 1.0)).holds is False
    assert tell(made(RELU_LIMIT, 0.95)).holds is False


def test_its_figure_adds_up_what_grew():
    of = tell(made(RELU_LIMIT, 1.0)).figures[0]
    measured, theory = of.lines[0], of.lines[-1]
    assert np.allclose(measured.y, theory.y)
    assert measured.y[-1] == pytest.approx((LAYERS - 7) * math.log10(RELU_LIMIT))
