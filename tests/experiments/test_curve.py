"""Accuracy over steps: what is read off it, also where it ends early or never begins."""

import json
import math

import numpy as np

from pipeline.experiments.curve import Curve, curve, mean_line

CURVE = Curve(np.array([10.0, 20.0, 30.0]), np.array([0.2, 0.6, 0.5]))
NOTHING = Curve(np.array([]), np.array([]), diverged=True)


def test_best_last_and_first_are_of_the_validations():
    assert (CURVE.best, CURVE.last) == (0.6, 0.5)
    assert [CURVE.first_at(top1) for top1 in (0.2, 0.5, 0.61)] == [10.0, 20.0, math.inf]


def test_what_diverged_before_a_validation_reached_nothing():
    assert (NOTHING.best, NOTHING.last, NOTHING.first_at(0.1)) == (0.0, 0.0, math.inf)


def test_what_diverged_later_ends_with_nothing_and_keeps_its_best():
    late = Curve(CURVE.step_V, CURVE.top1_V, diverged=True)
    assert (late.best, late.last) == (0.6, 0.0)


def test_it_is_the_same_after_a_way_through_json():
    for each in (CURVE, NOTHING):
        back = curve(json.loads(json.dumps(each.measured())))
        assert np.array_equal(back.step_V, each.step_V)
        assert np.array_equal(back.top1_V, each.top1_V)
        assert back.diverged == each.diverged


def test_a_mean_goes_as_far_as_every_seed_did():
    short = Curve(CURVE.step_V[:2], np.array([0.4, 0.8]))
    line = mean_line("both", [CURVE, short], 0)
    assert np.allclose(line.y, [0.3, 0.7])
    assert line.low is not None
    assert (line.low >= 0).all()
    assert len(mean_line("none", [CURVE, NOTHING], 0).x) == 0


def test_one_seed_has_no_band():
    assert mean_line("one", [CURVE], 0).low is None
