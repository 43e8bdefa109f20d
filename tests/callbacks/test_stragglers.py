"""A rank that is slow again and again is named, and no other: by hand-made times."""

import numpy as np
import pytest

from pipeline.callbacks.stragglers import (
    COLUMNS,
    MOST,
    WINDOW,
    Seat,
    Slowest,
    Stragglers,
    Times,
    excess,
    of_the_others,
    slowest,
)


def noisy(looks: int, ranks: int, spread: float, seed: int = 0) -> np.ndarray:
    """Milliseconds a step, around 100; heavy-tailed to the slow side, as a busy machine is."""
    random = np.random.default_rng(seed)
    return 100 * (1 + spread * random.standard_exponential((looks, ranks)))


def own(table: np.ndarray) -> Slowest:
    return slowest(excess(table, np.zeros_like(table)).own)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 64])
def test_the_median_of_the_others_is_what_leaving_one_out_gives(ranks):
    values = np.random.default_rng(ranks).integers(0, 5, (6, ranks)).astype(float)  # with many equal ones
    expected = [[np.median(np.delete(row, rank)) for rank in range(ranks)] for row in values]
    assert np.array_equal(of_the_others(values), expected)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_rank_that_takes_a_fifth_longer_is_named_with_how_much(ranks, spread):
    times = noisy(WINDOW, ranks, spread)
    times[:, ranks - 1] *= 1.2
    found = own(times)
    assert found.rank == ranks - 1
    assert found.excess == pytest.approx(0.2, abs=0.04 if spread else 1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 32])
@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3, 1.0])
def test_noise_of_a_busy_machine_names_nobody(ranks, spread):
    for seed in range(300):
        assert own(noisy(WINDOW, ranks, spread, seed)).rank is None, seed


def test_a_rank_that_was_slow_in_a_few_looks_is_not_named():
    times = np.full((WINDOW, 4), 100.0)
    times[: MOST - 1, 2] = 300.0
    assert own(times) == Slowest(None, 2.0)
    times[MOST - 1, 2] = 300.0
    assert own(times) == Slowest(2, 2.0)


def test_a_rank_of_which_nothing_seems_left_makes_no_ratio_without_measure():
    """On a GPU the waits of one step stand for those of all, and may be more than a fast rank's time."""
    times = np.full((WINDOW, 4), 100.0)
    times[0] = [0.0, 0.0, 0.0, 300.0]
    assert excess(times, np.zeros_like(times)).own[0].tolist() == [-1.0, -1.0, -1.0, 9.0]


def test_of_two_slow_ranks_the_slower_one_is_named_and_little_is_not_slow():
    times = np.full((WINDOW, 5), 100.0)
    times[:, 1], times[:, 3] = 115.0, 130.0
    assert own(times) == Slowest(3, pytest.approx(0.3))
    times[:, 1], times[:, 3] = 100.0, 109.0
    assert own(times) == Slowest(None, pytest.approx(0.09))


def test_before_there_are_enough_looks_nobody_is_named():
    times = np.full((MOST - 1, 3), 100.0)
    times[:, 0] = 200.0
    assert own(times) == Slowest(None, 1.0)
    assert own(np.vstack([times, times[:1]])) == Slowest(0, 1.0)


def test_waiting_for_data_is_measured_against_a_step_since_others_may_not_wait_at_all():
    work, data = np.full((WINDOW, 4), 80.0), np.zeros((WINDOW, 4))
    data[:, 2] = 20.0
    found = excess(work, data)
    assert slowest(found.data) == Slowest(2, pytest.approx(0.25))
    assert slowest(found.own).rank is None
    data[:] = 60.0  # that all wait alike is not the fault of one
    assert slowest(excess(work, data).data).rank is None


class Watched:
    """Rows of 10 steps of three ranks, of which one may be slow."""

    def __init__(self, path):
        self.said: list[str] = []
        self.stragglers = Stragglers(path, say=self.said.append)
        self.stragglers.seats = (Seat(0, "a"), Seat(0, "a"), Seat(1, "b"))
        self.step = 0

    def rows(self, count, own_ms=(100, 100, 100), data_ms=(0, 0, 0)):
        for _ in range(count):
            self.step += 10
            times = [Times(a / 100, b / 100) for a, b in zip(own_ms, data_ms, strict=True)]  # seconds of 10 steps
            row = self.stragglers.add(self.step, 10, times)
        return row


def test_a_row_names_who_stands_out_and_the_output_says_it_once(tmp_path):
    watched = Watched(tmp_path / "ranks.csv")
    watched.stragglers.begin(0)
    assert watched.rows(1) == {"slowest_rank": None, "slowest_over_median": 1.0, "slowest_data_rank": None}
    slow = {"slowest_rank": 2, "slowest_over_median": 1.21, "slowest_data_rank": None}
    assert watched.rows(WINDOW + 2, (100, 100, 121)) == slow
    (said,) = watched.said
    assert said.startswith(f"WARNING: step {10 * (1 + MOST)}: rank 2 (node 1, b) takes 1.21 times the median's own")
    assert watched.rows(WINDOW, data_ms=(0, 30, 0)) == {
        "slowest_rank": None, "slowest_over_median": 1.0, "slowest_data_rank": 1,
    }  # fmt: skip
    assert "rank 1 (node 0, a) waits for data, by 30% of a step more" in watched.said[1]
    assert watched.rows(WINDOW, (100, 100, 121)) == slow
    assert len(watched.said) == 2  # it was said before
    header, *lines = (tmp_path / "ranks.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert lines[:3] == ["10,0,0,a,0.1,0", "10,1,0,a,0.1,0", "10,2,1,b,0.1,0"]
    assert lines[5] == "20,2,1,b,0.121,0"


def test_clocks_that_stand_still_name_nobody(tmp_path):
    watched = Watched(tmp_path / "ranks.csv")
    watched.stragglers.begin(0)
    rows = [watched.stragglers.add(step, 0, [Times(0.0, 0.0)] * 3) for step in range(WINDOW)]
    assert rows[-1]["slowest_rank"] is rows[-1]["slowest_data_rank"] is None


def test_a_start_keeps_the_looks_of_steps_that_count_and_judges_by_its_own(tmp_path):
    path = tmp_path / "ranks.csv"
    first = Watched(path)
    first.stragglers.begin(0)
    first.rows(WINDOW, (100, 100, 150))
    with path.open("a") as file:
        file.write("9999,0,0")  # as a kill leaves it
    later = Watched(path)
    later.stragglers.begin(75)
    later.step = 75
    assert later.rows(1)["slowest_rank"] is None
    steps = [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]]
    assert sorted(set(steps)) == [10, 20, 30, 40, 50, 60, 70, 85]
    assert len(steps) == 3 * 8
