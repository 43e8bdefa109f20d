import torch
from torch import nn

from pipeline.norm import SyncBatchNorm
from pipeline.norm.population import estimate, merge_groups
from tests.multiprocess.ranks import run_ranks, with_group


def images(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 4, 4, generator=generator, dtype=torch.float64) * (i + 1) + i for i in range(count)]


def test_population_is_the_mean_of_batch_means_and_of_unbiased_variances():
    layer, batches = SyncBatchNorm(3).double(), images(4, 5)
    layer.running_mean.fill_(99)  # whatever was there is forgotten
    assert estimate(layer, batches) == 4
    torch.testing.assert_close(layer.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    unbiased = torch.stack([b.var((0, 2, 3), correction=1) for b in batches]).mean(0)
    torch.testing.assert_close(layer.running_var, unbiased)


def test_estimating_leaves_weights_modes_and_momenta_alone():
    model = nn.Sequential(SyncBatchNorm(3, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(3)).double().eval()
    model[0].train()
    weights = [p.clone() for p in model.parameters()]
    estimate(model, images(2, 4))
    assert [m.training for m in model] == [True, False, False]
    assert model[0].momentum == 0.3
    assert model[2].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_no_batch_leaves_the_statistics_as_they_were():
    layer = SyncBatchNorm(3)
    layer.running_mean.fill_(7)
    assert estimate(layer, []) == 0
    assert (layer.running_mean == 7).all()


def rank_with_own_statistics(rank, world, group_size):
    layer = SyncBatchNorm(3, group_size=group_size).double()
    estimate(layer, [batch[rank::world] for batch in images(3, 6)])
    return layer.running_mean.numpy(), layer.running_var.numpy()


def test_groups_end_with_the_merge_of_all():
    for group_size in (0, 1):
        results = run_ranks(2, with_group, rank_with_own_statistics, group_size)
        assert all((a == b).all() for a, b in zip(*results, strict=True))
    parts = [batch[rank::2] for batch in images(3, 6) for rank in range(2)]
    expected = torch.stack([p.var((0, 2, 3), correction=1) for p in parts]).mean(0)
    torch.testing.assert_close(torch.from_numpy(results[0][1]), expected)


def test_merging_alone_changes_nothing():
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3, 2))
    before = layer.running_mean.clone()
    merge_groups(layer)
    assert torch.equal(layer.running_mean, before)
