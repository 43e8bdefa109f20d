from pathlib import Path

import pytest
import torch

from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.batch import Batch
from pipeline.data.datamodule import ImageData
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.loader import Batching
from pipeline.data.shards import DataError, read_manifest


def data(root: Path, **batching: int) -> ImageData:
    return ImageData(
        open_dataset(Location(str(root))),
        num_classes=5,
        augment=Augmentation(16),
        crop=CentreCrop(16, 1.0),
        batching=Batching(**{"global_batch_size": 24, **batching}),
    )


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_an_epoch_is_whole_global_batches_of_distinct_samples_and_says_what_it_leaves_out(shards):
    loader = data(shards).train_dataloader()
    epoch = list(loader)
    assert (len(loader), loader.dropped) == (5, 10)
    assert [len(batch.label_N) for batch in epoch] == [24] * 5
    assert len(set(joined(epoch).sample_N.tolist())) == 120


def test_two_epochs_leave_out_other_samples(shards):
    loader = data(shards).train_dataloader()
    first, second = (set(joined(list(loader)).sample_N.tolist()) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_images_do_not_depend_on_ranks(shards, world):
    whole = list(data(shards).train_dataloader())
    ranks = [list(data(shards, world=world, rank=rank).train_dataloader()) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert same(joined([rank[step] for rank in ranks]), batch)


@pytest.mark.parametrize("workers", [1, 2])
def test_images_do_not_depend_on_workers(shards, workers):
    alone, helped = (list(data(shards, workers=n).train_dataloader()) for n in (0, workers))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_images_do_not_depend_on_the_micro_batch(shards):
    whole, cut = data(shards).train_dataloader(), data(shards, micro_batch_size=5).train_dataloader()
    assert len(cut) == 5 * 5
    assert same(joined(list(cut)), joined(list(whole)))


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_loader_continues_at_its_position_with_any_micro_batch(shards, stop):
    straight = data(shards).train_dataloader()
    epochs = [*straight, *straight]
    stopped = data(shards).train_dataloader()
    for _ in zip(range(stop), stopped, strict=False):
        pass
    resumed = data(shards, micro_batch_size=7).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert same(joined(list(resumed)), joined(epochs[stop : 5 if stop < 5 else 10]))


def test_the_end_of_an_epoch_is_the_start_of_the_next(shards):
    loader = data(shards).train_dataloader()
    list(loader)
    digest = read_manifest(shards).digest
    assert loader.state_dict() == {"epoch": 1, "sample": 0, "global_batch_size": 24, "digest": digest}


def test_another_global_batch_in_the_middle_is_refused(shards):
    loader = data(shards, global_batch_size=20).train_dataloader()
    with pytest.raises(DataError, match=r"data\.global_batch_size = 20, but the checkpoint was written with 24"):
        loader.load_state_dict(data(shards).train_dataloader().state_dict())


def test_a_batch_larger_than_the_data_set_is_refused(shards):
    with pytest.raises(DataError, match="exceeds the 130 training images"):
        data(shards, global_batch_size=131)


def test_population_batches_depend_on_the_seed_alone_and_move_nothing(shards):
    loader = data(shards, micro_batch_size=8).train_dataloader()
    batches = list(loader.population_batches(40))
    assert sum(len(b.label_N) for b in batches) == 40
    assert loader.state_dict()["sample"] == 0
    list(loader)
    assert all(same(a, b) for a, b in zip(loader.population_batches(40), batches, strict=True))
    assert not same(batches[0], next(iter(data(shards, micro_batch_size=8).train_dataloader())))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [0, 4])
def test_evaluation_counts_each_image_once_on_any_number_of_ranks(shards, world, micro):
    ranks = [list(data(shards, world=world, rank=r, micro_batch_size=micro).val_dataloader()) for r in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # none waits for another
    assert len({batch.image_NCHW.shape for rank in ranks for batch in rank}) == 1  # one shape: nothing recompiles
    real = [
        s for rank in ranks for b in rank for s, w in zip(b.sample_N.tolist(), b.weight_N.tolist(), strict=True) if w
    ]
    assert sorted(real) == list(range(35))
