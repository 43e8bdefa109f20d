from itertools import islice

import numpy as np

from pipeline.data.keyed_random import mixed, permutation, signed, uniforms


def test_numbers_are_the_same_for_ever():
    # Golden: a change here changes the order and the pixels of every run ever started.
    assert mixed(1, 2, 3) == 0xD0734750FDE362B3
    assert permutation(8, key=5).tolist() == [4, 5, 3, 6, 1, 0, 2, 7]
    assert [round(u, 6) for u in islice(uniforms(9), 3)] == [0.682363, 0.750695, 0.265322]


def test_parts_and_their_order_matter():
    assert len({mixed(1, 2), mixed(2, 1), mixed(1, 2, 0), mixed(12), mixed(-1, 2)}) == 5


def test_permutations_are_permutations_and_differ_by_key():
    for count in (0, 1, 2, 1000):
        assert sorted(permutation(count, key=3)) == list(range(count))
    assert (permutation(1000, key=1) != permutation(1000, key=2)).mean() > 0.99


def test_first_place_is_uniform_over_keys():
    firsts = np.bincount([permutation(10, mixed(key))[0] for key in range(5000)], minlength=10)
    assert ((firsts - 500) ** 2 / 500).sum() < 27.9  # chi-squared, 9 degrees of freedom, one in a thousand


def test_uniforms_are_uniform():
    values = np.array([next(uniforms(mixed(key))) for key in range(5000)])
    assert 0 <= values.min() < values.max() < 1
    counts = np.bincount((values * 10).astype(int), minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9


def test_signed_keeps_all_bits():
    for bits in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        assert signed(bits) % 2**64 == bits
