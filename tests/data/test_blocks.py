from pathlib import Path

import pytest
import torch

from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.batch import Batch
from pipeline.data.blocks import BlockLoader, open_blocks
from pipeline.data.crops import Views
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.evaluation_set import own_images
from pipeline.data.images import open_images
from pipeline.data.loader import Batching, Items, TrainShares, Workers


def loader(root: Path, numbers: list[int], *, views: int = 10, workers: int = 0) -> BlockLoader:
    dataset = open_dataset(Location(str(root)))
    shares = TrainShares(open_images(dataset, "train", 5), Augmentation(16), Batching(24))
    items = Items(shares, lambda: open_blocks(own_images(dataset, 5), Views(views, CentreCrop(16)), 4))
    return BlockLoader(Workers(items, workers), numbers)


def images(batches: list[Batch], views: int) -> list[int]:
    samples = torch.cat([batch.sample_N[batch.weight_N > 0] for batch in batches])
    return samples.view(-1, views)[:, 0].tolist()


@pytest.mark.parametrize("views", [1, 10, 144])
def test_blocks_have_each_image_once_and_one_shape(shards, views):
    blocks = loader(shards, list(range(9)), views=views)
    batches = list(blocks)
    assert len(blocks) == len(blocks.workers.items.evaluation) == 9
    assert images(batches, views) == list(range(35))
    assert {batch.image_NCHW.shape for batch in batches} == {(4 * views, 3, 16, 16)}
    assert batches[-1].weight_N.sum() == 3 * views  # of 35 images, four at a time


def test_all_views_of_an_image_stand_together_with_its_label(shards):
    (batch,) = loader(shards, [2])
    assert batch.sample_N.view(4, 10).tolist() == [[sample] * 10 for sample in (8, 9, 10, 11)]
    assert all(len(row.unique()) == 1 for row in batch.label_N.view(4, 10))
    flips = batch.variation_NV[:, 0].view(4, 10)
    assert flips.tolist() == [[0.0] * 5 + [1.0] * 5] * 4


def test_a_rank_loads_the_blocks_it_asks_for_in_that_order(shards):
    assert images(list(loader(shards, [8, 1])), 10) == [32, 33, 34, 4, 5, 6, 7]
    assert list(loader(shards, [])) == []
