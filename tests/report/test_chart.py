import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.report.chart import (
    COLUMNS,
    Area,
    Bar,
    Chart,
    Lanes,
    Line,
    Stroke,
    Text,
    compact,
    drawn,
    percent,
    power_of_ten,
    power_of_two,
    reduced,
    ticks,
)


def line(y, x=None, **more) -> Line:
    y = np.asarray(y, dtype=float)
    return Line("a", np.arange(len(y), dtype=float) if x is None else np.asarray(x, dtype=float), y, 0, **more)


def test_a_long_line_keeps_the_extremes_of_what_it_stands_for():
    y = np.random.default_rng(0).normal(size=45_000)
    y[31_337], y[7] = 99.0, -99.0
    short = reduced(line(y))
    assert len(short.x) <= COLUMNS
    assert (short.low.min(), short.high.max()) == (-99.0, 99.0)
    assert (short.low <= short.y).all()
    assert (short.y <= short.high).all()
    column = (np.arange(45_000) / 44_999 * COLUMNS).astype(int).clip(0, COLUMNS - 1)
    np.testing.assert_allclose(np.average(short.y, weights=np.bincount(column)), y.mean(), atol=1e-12)


def test_a_short_line_is_drawn_point_by_point_and_gaps_are_left_out():
    short = reduced(line([1.0, np.nan, 3.0]))
    assert short.x.tolist() == [0, 2]
    assert short.low is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_around_what_they_measure(low, width):
    assume(width > 1e-6 * abs(low))  # below that, neighbours are not told apart in what is printed
    found = ticks(low, low + width, 5)
    assert 2 <= len(found) <= 9
    unseen = 1e-6 * width
    assert found[0] <= low + unseen
    assert found[-1] >= low + width - unseen
    assert np.allclose(np.diff(found), found[1] - found[0], rtol=1e-3)


@pytest.mark.parametrize("values", [[], [np.nan], [0.5], [0.0, 0.0], [1e30, -1e30], [np.inf, 1.0]])
def test_a_chart_of_hardly_anything_is_drawn(values):
    scene = drawn(Chart("k", "t", "x", [line(values)], percent, low=0.0))
    assert any(isinstance(mark, Text) for mark in scene.marks)
    for mark in scene.marks:
        if isinstance(mark, Stroke | Area):
            assert np.isfinite(np.array(mark.points)).all()


def test_curves_stay_within_their_frame_where_an_axis_leaves_outliers_out():
    y = np.ones(500)
    y[3] = 1e9
    scene = drawn(Chart("k", "t", "x", [line(y)], compact, low=0.0, robust=True))
    left, right, *_, bottom, top, low, high = (*scene.axes[:4], *scene.axes[4:])
    assert (low, high < 10) == (0.0, True)
    curve = next(mark for mark in scene.marks if isinstance(mark, Stroke) and mark.name)
    points = np.array(curve.points)
    assert points[:, 0].min() >= left
    assert points[:, 0].max() <= right
    assert points[:, 1].min() >= top - 1e-9
    assert points[:, 1].max() <= bottom + 1e-9


def test_lanes_are_as_long_as_their_bars():
    bars = [[Bar(0, 1, "a", 0), Bar(1, 4, "b", 1)], [Bar(0, 2, "c", 0)]]
    scene = drawn(Lanes("k", "t", "hours", ["one", "two"], bars, compact))
    areas = [np.array(mark.points) for mark in scene.marks if isinstance(mark, Area)]
    widths = [area[:, 0].max() - area[:, 0].min() for area in areas]
    assert widths == pytest.approx([widths[0], 3 * widths[0], 2 * widths[0]])


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (1.2e6, "1.2M"), (3e9, "3G")])
def test_numbers_are_short(value, text):
    assert compact(value) == text


def test_the_label_of_a_rule_stands_where_no_curve_does():
    falls, rises = line([0.9, 0.5, 0.1]), line([0.1, 0.5, 0.9])
    for lines, anchor in (([falls], "end"), ([rises], "start")):
        scene = drawn(Chart("k", "t", "x", lines, percent, low=0.0, high=1.0, rules=[(0.85, "target 85 %")]))
        (label,) = [mark for mark in scene.marks if isinstance(mark, Text) and mark.text == "target 85 %"]
        assert label.anchor == anchor


def test_axes_of_logarithms_say_what_they_are_powers_of():
    assert [power_of_ten(exponent) for exponent in (-8, -2, 0, 2, 2.5, 5)] == [
        "1e-8",
        "0.01",
        "1",
        "100",
        "10^2.5",
        "1e5",
    ]
    assert [power_of_two(exponent) for exponent in (0, 1, 1.5, 10)] == ["1", "2", "", "1024"]
