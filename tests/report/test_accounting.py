"""Goodput and its parts against a run whose seconds were written down by hand."""

import math

import numpy as np
import pytest

from pipeline.report.accounting import account, best_top1, ends, first_at, lost_steps, running_hours
from pipeline.report.record import read_run
from tests.report.runs import BEGAN, make_run, simple, start, train, val

# Three interruptions. Seconds since the beginning:
#    0 start 1; training from 20; rows at 30 (10 steps), 40 (20); a checkpoint of step 20; asked to end at 45
#   65 start 2 (from 20); training from 75; rows at 85 (30), 95 (40); killed at about 99 (step 44), nothing noted
#  120 start 3 (from 30); training from 130; row at 141 (40); a validation of 4 s until 145; fails at 150
#  160 start 4 (from 40); training from 170; a row at 183 (50), of which 3 s were trained before; done at 190
ROWS = [
    train(10, 30, seconds=10),
    train(20, 40, seconds=20),
    train(30, 85, seconds=10),
    train(40, 141, seconds=11, span=11.0, checkpoint_wait=1 / 11, data_wait=2 / 11),
    val(40, 0.8, 145, seconds=15, span=4.0),
    train(50, 183, seconds=13, span=16.0, data_wait=0.25),
]
STARTS = [
    start(0, 0, "interrupted", 45),
    start(65, 20, None),
    start(120, 30, "failed", 150, undone={"step": 44, "at": BEGAN + 99}),
    start(160, 40, "done", 190),
]


@pytest.fixture
def run(tmp_path):
    return read_run(make_run(tmp_path / "run", ROWS, STARTS))


def test_goodput_of_three_interruptions_is_what_was_computed_by_hand(run):
    found = account(run)
    useful = 9 + 9 + 9 + (11 - 1 - 2) + 12
    assert found.wall == 190
    assert found.useful == pytest.approx(useful)
    assert found.goodput == pytest.approx(useful / 190)
    assert found.data == pytest.approx(1 + 1 + 1 + 2 + 4)
    assert found.checkpoints == pytest.approx(1)
    assert found.validation == 4
    assert found.beginning == pytest.approx(20 + 10 + 10 + 10)
    assert found.between == pytest.approx((65 - 45) + (120 - 99) + (160 - 150))
    assert found.statistics == pytest.approx(0.05 * (30 + 11 + 16))
    assert found.lost == pytest.approx(190 - useful - 9 - 1 - 4 - 50 - 51)


def test_the_parts_of_the_time_are_the_whole(run):
    found = account(run)
    parts = (found.useful, found.data, found.checkpoints, found.validation, found.beginning, found.between, found.lost)
    assert sum(parts) == pytest.approx(found.wall)


def test_a_start_that_noted_no_end_ended_with_the_last_that_is_known_of_it(run):
    assert [end - BEGAN for end in ends(run)] == [45, 99, 150, 190]


def test_steps_that_were_done_again_are_counted_where_they_are_known(run):
    assert lost_steps(run) == [0, 0, 14, 0]


def test_running_time_leaves_out_what_lies_between_starts(run):
    seconds = running_hours(run, run.train) * 3600
    first, second, third = 45, 99 - 65, 150 - 120
    expected = [30, 40, first + 20, first + second + 21, first + second + third + 23]
    np.testing.assert_allclose(seconds, expected, atol=1e-6)


def test_running_time_of_rows_that_know_their_start_alone_goes_on_where_the_last_ended(tmp_path):
    directory = make_run(tmp_path / "old")
    lines = [f"{step},1,train,1,0.5,1,8,0.1,9,0.0,{seconds}" for step, seconds in ((1, 10), (2, 20), (3, 5), (4, 8))]
    (directory / "metrics.csv").write_text(
        "\n".join(["step,epoch,split,loss,top1,top5,images,rate,images_per_s,data_wait,seconds", *lines, ""])
    )
    old = read_run(directory)
    np.testing.assert_allclose(running_hours(old, old.train) * 3600, [10, 20, 25, 28])
    assert account(old) is None


def test_steps_to_a_target_are_those_of_the_first_validation_that_reaches_it(tmp_path):
    run = read_run(simple(tmp_path / "a", best=0.8))
    reached = first_at(run, 0.8)
    assert (reached.step, reached.epoch) == (20, 2.0)
    assert reached.hours * 3600 == pytest.approx(21)
    assert first_at(run, 0.4).step == 10  # met exactly
    assert first_at(run, 0.80001) is None
    assert best_top1(run) == 0.8
    assert math.isnan(best_top1(read_run(make_run(tmp_path / "none"))))


def test_a_run_that_goes_on_is_accounted_up_to_its_newest_row(tmp_path):
    run = read_run(make_run(tmp_path / "a", ROWS[:2], [start(0, ended=None)]))
    assert account(run).wall == 40
    assert account(run).goodput == pytest.approx(18 / 40)
