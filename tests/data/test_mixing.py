"""The law of mixing: the same pairs, shares, boxes and labels for any split of a batch over ranks."""

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.data.augment import Augmentation, CentreCrop, Growth, Preparation
from pipeline.data.datamodule import ImageData
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.keyed_random import mixed, uniforms
from pipeline.data.loader import Batching
from pipeline.data.mixing import UNMIXED, Mix, Mixing, beta, blended, partner

BOTH = Mixing(0.4, 1.0)
PREPARE = Preparation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def data(root, mixing=BOTH, **batching):
    augment = Augmentation(16, mixing=mixing)
    how = Batching(**{"global_batch_size": 25, **batching})
    return ImageData(open_dataset(Location(str(root))), num_classes=5, augment=augment, crop=CentreCrop(16, 1.0),
                     batching=how)  # fmt: skip


def seen(batch) -> list[torch.Tensor]:
    """What the network gets of a batch: images, both labels, the first one's share, keys."""
    image_RCHW = PREPARE(batch.image_NCHW, batch.variation_NV, torch.float32)
    image_NCHW = blended(image_RCHW, batch.partner_N2, batch.mix_N5)
    return [image_NCHW, batch.label_N, batch.partner_N2[:, 1], batch.mix_N5, batch.key_N]


@pytest.mark.parametrize("world", [2, 3, 4, 7, 25, 26])
@pytest.mark.parametrize("micro", [0, 3])
def test_any_number_of_ranks_and_micro_batches_mixes_the_same_pairs(shards, world, micro):
    whole = [seen(batch) for batch in data(shards).train_dataloader()]
    pieces = data(shards, world=world, micro_batch_size=micro).batching.pieces
    ranks = [list(data(shards, world=world, rank=r, micro_batch_size=micro).train_dataloader()) for r in range(world)]
    for step, expected in enumerate(whole):
        parts = [seen(rank[step * pieces + piece]) for piece in range(pieces) for rank in ranks]
        for found, all_of_it in zip(zip(*parts, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(found), all_of_it)


def test_a_share_decodes_at_most_two_images_more(shards):
    for rank in range(4):
        for batch in data(shards, world=4, rank=rank).train_dataloader():
            assert len(batch.label_N) <= len(batch.image_NCHW) <= len(batch.label_N) + 2


def test_mixing_is_resumed_in_the_middle_of_an_epoch(shards):
    straight = [seen(batch) for batch in data(shards).train_dataloader()]
    loader = data(shards, world=1, workers=1).train_dataloader()
    loader.load_state_dict({"epoch": 0, "sample": 75, "global_batch_size": 25})
    for found, expected in zip([seen(batch) for batch in loader], straight[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_statistics_are_estimated_of_images_that_are_not_mixed(shards):
    mixes, plain = (data(shards, mixing).train_dataloader() for mixing in (Mixing(1.0), None))
    for found, expected in zip(mixes.population_batches(50), plain.population_batches(50), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (found.mix_N5[:, 0] == 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 24, 25])
def test_all_have_a_partner_and_pairs_are_mutual_but_for_an_odd_one_out(size):
    for place in range(size):
        other = partner(place, size)
        assert 0 <= other < size
        assert abs(other - place) == (0 if size == 1 else 1)
        assert partner(other, size) == place or (place == size - 1 and size % 2)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 2.0])  # of less, much lies nearer to 1 than a float can say
def test_shares_have_the_density_of_beta(alpha):
    found = [beta(alpha, uniforms(mixed(7, key))) for key in range(2000)]
    assert all(0 <= share <= 1 for share in found)
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_a_box_says_its_share_to_the_pixel_and_stays_within_the_image():
    for key in range(300):
        mix = Mixing(cutmix=1.0).draw(mixed(key), 17)
        assert 0 <= mix.left <= mix.right <= 17
        assert 0 <= mix.top <= mix.bottom <= 17
        assert mix.share == 1 - (mix.right - mix.left) * (mix.bottom - mix.top) / 17**2
    kinds = [Mixing(1.0, 1.0).draw(mixed(key), 17).right > 0 for key in range(400)]
    assert 120 < sum(kinds) < 280


def test_blended_pixels_are_those_of_the_definition():
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 6, 6)))  # three, and a partner held elsewhere
    mixes = [Mix(0.3), Mix(1 - 6 / 36, 2, 1, 5, 3), UNMIXED]
    found = blended(images, torch.tensor([[1, 4], [2, 0], [0, 2]]), torch.tensor(mixes, dtype=torch.float64))
    expected = images[:3].clone()
    expected[0] = 0.3 * images[0] + 0.7 * images[1]
    expected[1, :, 1:3, 2:5] = images[3][:, 1:3, 2:5]
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1:], expected[1:])


def test_images_grow_by_whole_steps_to_their_full_size():
    growth = Growth(first=0.5714286, steps=3, epochs=12)
    assert [growth.size(epoch, 224) for epoch in (0, 3, 4, 7, 8, 11, 12, 90)] == [
        128,
        128,
        160,
        160,
        192,
        192,
        224,
        224,
    ]
    assert growth.sizes(224) == [128, 160, 192, 224]
    assert Growth(0.4, 4, 0.5).sizes(24) == [10, 24]


@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_has_one_size_on_all_ranks_and_statistics_the_full_one(shards, world):
    augment = Augmentation(16, growth=Growth(0.5, 2, 2))
    for rank in range(world):
        images = ImageData(
            open_dataset(Location(str(shards))), num_classes=5, augment=augment, crop=CentreCrop(16, 1.0),
            batching=Batching(global_batch_size=24, world=world, rank=rank),
        )  # fmt: skip
        loader = images.train_dataloader()
        sizes = [{batch.image_NCHW.shape[-1] for batch in loader} for _ in range(4)]
        assert sizes == [{8}, {12}, {16}, {16}]
        loader.load_state_dict({"epoch": 1, "sample": 72, "global_batch_size": 24})
        assert [batch.image_NCHW.shape[-1] for batch in loader] == [12, 12]
        assert {batch.image_NCHW.shape[-1] for batch in loader.population_batches(48)} == {16}
        assert {batch.image_NCHW.shape[-1] for batch in images.val_dataloader()} == {16}
