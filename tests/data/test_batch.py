import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.augment import UNCHANGED, Variation
from pipeline.data.batch import collate, micro_batches, rank_places, share

sizes = st.integers(1, 300)
few = st.integers(1, 12)


@given(st.integers(0, 300), few)
def test_shares_are_contiguous_complete_and_differ_by_at_most_one(total, parts):
    pieces = [share(total, parts, part) for part in range(parts)]
    assert [i for piece in pieces for i in piece] == list(range(total))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@given(sizes, few, st.integers(0, 40))
def test_micro_batches_over_ranks_cover_the_global_batch_once_and_fit(total, world, micro):
    pieces = micro_batches(total, world, micro)
    dealt = [[rank_places(total, pieces, p, world, r) for r in range(world)] for p in range(pieces)]
    assert sorted(i for piece in dealt for places in piece for i in places) == list(range(total))
    for piece in dealt:
        together = sorted(i for places in piece for i in places)
        assert together == list(range(together[0], together[0] + len(together))) if together else True
        if micro:
            assert max(map(len, piece)) <= micro


def test_the_micro_batch_does_not_depend_on_ranks_for_the_same_number_of_pieces():
    for world in (1, 2, 3):
        together = [i for r in range(world) for i in rank_places(25, 3, 1, world, r)]
        assert together == list(range(9, 17))


def test_padding_has_no_weight_and_images_stay_in_place():
    images = [np.full((4, 4, 3), value, np.uint8) for value in (7, 9)]
    batch = collate(images, [1, 2], [2**64 - 1, 5], [Variation(1, 2, 3, 4), UNCHANGED], [10, 11], 4, padded_to=3)
    assert batch.image_NCHW.shape == (3, 3, 4, 4)
    assert batch.image_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert batch.weight_N.tolist() == [1, 1, 0]
    assert batch.key_N.tolist() == [-1, 5, 0]
    assert batch.image_NCHW[:, 0, 0, 0].tolist() == [7, 9, 0]
    assert batch.variation_NV.tolist() == [[1, 2, 3, 4], [0, 1, 1, 1], [0, 1, 1, 1]]
