"""What a watch says of norms, against the same from all ranks' values; and that it changes nothing."""

import math

import torch
from torch import nn

from pipeline.norm import SyncBatchNorm
from pipeline.norm.health import Watch, watch
from tests.multiprocess.ranks import run_ranks, with_group


def values(rank: int, images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(images, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 + rank


def rank_of_watch(rank, world, sizes):
    network = nn.Sequential(SyncBatchNorm(3, momentum=0.25), nn.ReLU(), nn.Conv2d(3, 2, 1), SyncBatchNorm(2)).double()
    with watch(network) as watching:
        assert watching.read() == {}
        network(values(rank, sizes[rank]))
    found = watching.read()
    network(values(rank, sizes[rank]) * 100)
    assert watching.read() == found  # it is over
    return list(found), *found["0"].__reduce__()[2]


def figures(sizes):
    (names, *first), *others = run_ranks(len(sizes), with_group, rank_of_watch, sizes)
    assert names == ["0", "3"]
    assert all(other == (names, *first) for other in others)  # the same on every rank
    return first


def test_spread_and_drift_are_those_of_all_ranks():
    sizes = (3, 0, 5)
    spread, dead, mean_drift, variance_drift = figures(sizes)
    parts = [values(rank, size) for rank, size in enumerate(sizes)]
    whole = torch.cat(parts)
    mean, variance = whole.mean((0, 2, 3)), whole.var((0, 2, 3), correction=0)
    between = sum(len(p) * (p.mean((0, 2, 3)) - mean).square() for p in parts if len(p)) / len(whole)
    assert math.isclose(spread, (between / variance).mean().sqrt(), rel_tol=1e-9)
    assert dead == 0
    assert math.isclose(mean_drift, (mean.square() / variance).mean().sqrt(), rel_tol=1e-9)  # as they began, 0 and 1
    assert math.isclose(variance_drift, variance.log().abs().mean(), rel_tol=1e-9)


def test_ranks_that_see_the_same_have_no_spread_and_others_have():
    same = torch.randn(4, 3, 5, 5)

    layer = SyncBatchNorm(3)
    watching = Watch(layer)
    layer(same)
    assert math.isnan(watching.read()[""].spread)  # alone
    spread, *_ = figures((6, 6))
    assert spread > 0.2  # their means are 0 and 1 at a deviation of 2


def test_channels_that_say_nothing_are_counted():
    layer = SyncBatchNorm(8)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias[2], layer.weight[2] = -9.0, 2.0
        layer.bias[3], layer.weight[3] = -7.0, -2.0  # 3.5 deviations: a little comes through
    x = torch.randn(4, 8, 3, 3)
    x[:, 0] = 5.0
    with watch(layer) as watching:
        layer(x)
    assert watching.read()[""].dead == 3 / 8


def test_watching_changes_no_bit_and_evaluation_is_not_watched():
    outputs = []
    for watched in (False, True):
        torch.manual_seed(0)
        layer, x = SyncBatchNorm(3, track_running_stats=True), torch.randn(5, 3, 2, 2)
        watching = Watch(layer) if watched else None
        outputs.append(layer(x))
        if watching:
            before = repr(watching.read())
            layer.eval()(x * 9)
            assert repr(watching.read()) == before
            watching.close()
    assert torch.equal(*outputs)


def test_a_norm_without_running_statistics_has_no_drift():
    layer = SyncBatchNorm(3, track_running_stats=False)
    with watch(layer) as watching:
        layer(torch.randn(5, 3, 2, 2))
    assert math.isnan(watching.read()[""].mean_drift)
    assert math.isnan(watching.read()[""].variance_drift)
