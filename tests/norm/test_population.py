import pytest
import torch
from torch import nn
from torch.optim import swa_utils

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


@pytest.mark.parametrize("layer", [SyncBatchNorm(3), nn.BatchNorm2d(3)])
def test_an_aggregate_has_the_moments_of_all_values(layer):
    layer.double()
    for offset in (0.0, 1e6):
        batches = [batch + offset for batch in images(4, 5)]
        assert estimate(layer, batches, form="aggregate") == 4
        values = torch.cat(batches)
        torch.testing.assert_close(layer.running_mean, values.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, values.var((0, 2, 3), correction=0), rtol=1e-9, atol=0)
    before = layer.running_mean.clone()
    layer.eval()(images(1, 5)[0])
    layer.train()(images(1, 5)[0])  # seen no longer
    assert not torch.equal(layer.running_mean, before)


def test_an_estimate_ends_after_so_many_images():
    layer = SyncBatchNorm(3).double()
    assert estimate(layer, images(4, 5), images=6) == 2
    assert estimate(layer, [(batch, "label") for batch in images(4, 5)], lambda b: layer(b[0]), images=15) == 3
    with pytest.raises(ValueError, match=r"form = 'mean' is not offered; choose one of \['batches', 'aggregate'\]"):
        estimate(layer, images(1, 5), form="mean")


def test_averaged_weights_have_statistics_of_their_own():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4)).double()
    averaged = swa_utils.AveragedModel(network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        network[0].weight.mul_(3)
    averaged.update_parameters(network)  # the first update copies
    with torch.no_grad():
        network[0].weight.mul_(3)
    averaged.update_parameters(network)
    estimate(averaged, images(2, 5))
    outputs = [averaged.module[0](batch) for batch in images(2, 5)]
    expected = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, expected.detach())


def rank_with_own_statistics(rank, world, group_size, form="batches", size=6):
    layer = SyncBatchNorm(3, group_size=group_size).double()
    estimate(layer, [batch[rank::world] for batch in images(3, size)], form=form)
    return layer.running_mean.numpy(), layer.running_var.numpy()


def test_groups_end_with_the_merge_of_all():
    for group_size in (0, 1):
        results = run_ranks(2, with_group, rank_with_own_statistics, group_size)
        assert all((a == b).all() for a, b in zip(*results, strict=True))
    parts = [batch[rank::2] for batch in images(3, 6) for rank in range(2)]
    expected = torch.stack([p.var((0, 2, 3), correction=1) for p in parts]).mean(0)
    torch.testing.assert_close(torch.from_numpy(results[0][1]), expected)


@pytest.mark.parametrize("group_size", [0, 1])
@pytest.mark.parametrize("size", [6, 5, 1])  # shares of 3 and 3, of 3 and 2, of 1 and none
def test_an_aggregate_over_groups_is_that_of_all_values(group_size, size):
    for mean, variance in run_ranks(2, with_group, rank_with_own_statistics, group_size, "aggregate", size):
        values = torch.cat(images(3, size))
        torch.testing.assert_close(torch.from_numpy(mean), values.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.from_numpy(variance), values.var((0, 2, 3), correction=0))


def rank_with_a_limit(rank, world):
    layer = SyncBatchNorm(3).double()
    return estimate(layer, [batch[rank::world] for batch in images(5, 5)], images=12)


def test_ranks_of_unequal_shares_take_as_many_batches():
    assert run_ranks(2, with_group, rank_with_a_limit) == [3, 3]  # of 5 images each


def test_a_norm_that_the_forward_pass_does_not_reach_is_no_obstacle():
    network = nn.ModuleList([SyncBatchNorm(3), SyncBatchNorm(3)]).double()
    assert estimate(network, images(2, 4), network[0], form="aggregate") == 2
    assert (network[0].running_mean != 0).all()
    assert (network[1].running_mean == 0).all()


def test_merging_alone_changes_nothing():
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3, 2))
    before = layer.running_mean.clone()
    merge_groups(layer)
    assert torch.equal(layer.running_mean, before)
