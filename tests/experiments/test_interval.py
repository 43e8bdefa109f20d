"""Student's interval: known values, and that it covers what it says."""

import math

import numpy as np
import pytest

from pipeline.experiments.interval import Interval, interval, verdict


def test_of_three_values_it_is_the_table_of_student():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_spread_to_be_known():
    assert interval([0.5]).half == math.inf
    assert interval([0.5]).said(1, 100, " %") == "50.0 %"


def test_none_have_no_mean():
    with pytest.raises(ValueError, match="needs values"):
        interval([])


def test_nineteen_of_twenty_cover_the_mean():
    drawn = np.random.default_rng(0).normal(3.0, 2.0, (2000, 4))
    covered = np.mean([interval(row).low <= 3.0 <= interval(row).high for row in drawn])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_a_claim_holds_where_every_difference_is_above_zero_and_fails_where_one_is_below():
    above, below, about = Interval(2.0, 1.0, 3), Interval(-2.0, 1.0, 3), Interval(0.5, 1.0, 3)
    assert verdict([above, above]) is True
    assert verdict([above, about]) is None
    assert verdict([above, about, below]) is False
    assert verdict([interval([1.0])]) is None  # one value


def test_of_no_difference_there_is_no_verdict():
    assert verdict([]) is None
