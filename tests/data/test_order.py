import numpy as np
import pytest

from pipeline.data.order import SORTED, WELL_MIXED, Order, shard_mixing, shuffle_quality


def places(order: Order, epoch: int) -> list[int]:
    return [order.sample(epoch, index) for index in range(len(order))]


@pytest.mark.parametrize("window", [0, 1, 2, 3, 99])
def test_every_sample_comes_exactly_once_an_epoch(window):
    order = Order([5, 3, 7, 1, 4], seed=3, window=window)
    for epoch in range(3):
        assert sorted(places(order, epoch)) == list(range(20))


def test_epochs_and_seeds_have_orders_of_their_own():
    order = Order([50, 50], seed=0)
    assert places(order, 0) != places(order, 1)
    assert places(order, 0) != places(Order([50, 50], seed=1), 0)
    assert places(order, 0) == places(Order([50, 50], seed=0), 0)


def test_order_is_a_function_of_the_place_whatever_was_asked_before():
    straight = Order([5, 3, 7], seed=1, window=2)
    expected = {(epoch, i): straight.sample(epoch, i) for epoch in range(2) for i in range(15)}
    jumping = Order([5, 3, 7], seed=1, window=2)
    for place in sorted(expected, key=lambda p: (p[1] * 7) % 15):
        assert jumping.sample(*place) == expected[place]


def test_a_window_holds_the_samples_of_its_shards_alone():
    order = Order([10] * 6, seed=0, window=2)
    for first in range(0, 60, 20):
        assert len({order.sample(0, i) // 10 for i in range(first, first + 20)}) == 2
    assert len({order.sample(0, i) // 10 for i in range(20)} & {order.sample(0, i) // 10 for i in range(20, 40)}) == 0


def test_the_first_sample_is_uniform_over_all_of_them():
    firsts = [Order([4, 4], seed=seed).sample(0, 0) for seed in range(2000)]
    counts = [firsts.count(sample) for sample in range(8)]
    assert sum((c - 250) ** 2 / 250 for c in counts) < 24.3  # chi-squared, 7 degrees of freedom, one in a thousand


def test_places_outside_an_epoch_are_refused():
    order = Order([2, 2], seed=0)
    for index in (-1, 4):
        with pytest.raises(IndexError, match="lies outside the epoch of 4 samples"):
            order.sample(0, index)
    with pytest.raises(ValueError, match=r"data\.window = -1 is negative"):
        Order([2], seed=0, window=-1)


def test_shards_come_in_the_order_in_which_windows_read_them():
    order = Order([5, 3, 7, 1, 4], seed=2, window=2)
    for epoch in range(3):
        shards = order.shards_from(epoch, 0)
        assert sorted(shards) == list(range(5))
        first = order.first
        for index in range(20):
            window = order.window_of(epoch, index)
            (shard,) = np.flatnonzero(
                (first[:-1] <= order.sample(epoch, index)) & (order.sample(epoch, index) < first[1:])
            )
            assert shard in shards[2 * window : 2 * window + 2]
        assert order.shards_from(epoch, 1) == shards[2:]
        assert order.window_of(epoch, 20) == 2


def test_shuffle_quality_tells_sorted_shards_from_mixed_ones():
    counts = [100] * 20
    by_class = np.repeat(np.arange(20), 100)
    mixed = by_class[np.random.default_rng(0).permutation(2000)]
    assert shard_mixing(counts, by_class) == 0
    assert shard_mixing(counts, mixed) > 0.95 > SORTED
    assert shuffle_quality(Order(counts, seed=0), by_class, 64) > WELL_MIXED  # a full shuffle mends any order
    assert shuffle_quality(Order(counts, seed=0, window=4), mixed, 64) > WELL_MIXED
    quality = [shuffle_quality(Order(counts, seed=0, window=window), by_class, 64) for window in (1, 2, 4, 10)]
    assert quality[0] < 0.2  # a batch that straddles two shards holds two classes
    assert quality == sorted(quality)
    assert quality[2] == pytest.approx(2 / np.log2(20), abs=0.1)  # four classes at a time: 2 bits of 4.3


def test_quality_of_a_single_class_is_no_fault():
    assert shuffle_quality(Order([8, 8], seed=0, window=1), np.zeros(16, int), 4) == 1
    assert shard_mixing([8, 8], np.zeros(16, int)) == 1


def test_a_place_far_into_an_epoch_costs_what_the_first_does():
    """O(1) in the position: only the window of the place is laid out."""
    order = Order([1251] * 1024, seed=0, window=16)
    order.sample(0, 1_200_000)
    assert order._window is not None
    assert len(order._window[1]) == 16 * 1251
