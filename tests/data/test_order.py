import pytest

from pipeline.data.order import Order


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
