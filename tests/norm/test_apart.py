"""Statistics from whole batches are those of Algorithm 2, and the same bits whoever holds which batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.norm import SyncBatchNorm
from pipeline.norm.apart import estimate_apart, set_statistics, statistics_of
from pipeline.norm.population import AGGREGATE, BATCHES, estimate
from tests.multiprocess.ranks import run_ranks, with_group

FORMS = (BATCHES, AGGREGATE)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), SyncBatchNorm(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 4, 1), SyncBatchNorm(4, group_size="node"),
    )  # fmt: skip


def images(batch: int) -> torch.Tensor:
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(batch)) * (batch + 1) + 3


def apart(rank: int, world: int, form: str, count: int) -> list[float]:
    module = network()
    mine = ((number, images(number)) for number in range(rank, count, world))
    estimate_apart(module, mine, count, module, form=form)
    return statistics_of(module).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_they_are_those_of_population_estimate(form):
    module = network()
    estimate(module, [images(number) for number in range(5)], form=form)
    assert apart(0, 1, form, 5) == pytest.approx(statistics_of(module).tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_they_are_the_same_bits_on_any_number_of_ranks(form):
    (alone,) = run_ranks(1, apart, form, 4)  # a process like the others: with as many threads
    for world in (2, 3, 5):  # of five ranks one has no batch
        for found in run_ranks(world, with_group, apart, form, 4):
            assert found == alone


def test_module_and_groups_are_left_as_found():
    module = network().eval()
    module[1].train()
    estimate_apart(module, [(0, images(0))], 1, module)
    assert [m.training for m in module] == [False, True, *[False] * 6]
    assert (module[1].momentum, module[4].momentum) == (0.1, 0.1)
    assert (module[1].group_size, module[7].group_size) == (0, "node")
    assert module[1].num_batches_tracked == 0


def test_without_a_batch_they_stay_as_they_were():
    module = network()
    before = statistics_of(module)
    estimate_apart(module, [], 0, module)
    assert torch.equal(statistics_of(module), before)


def test_a_norm_that_no_batch_passes_keeps_its_own():
    module = nn.ModuleList([SyncBatchNorm(3), SyncBatchNorm(3)])
    estimate_apart(module, [(0, images(0))], 1, module[0])
    assert module[0].running_mean.abs().min() > 1
    assert torch.equal(module[1].running_var, torch.ones(3))


def test_statistics_go_back_where_they_came_from():
    module, other = network(), network()
    estimate_apart(module, [(0, images(0))], 1, module)
    set_statistics(other, statistics_of(module))
    assert torch.equal(statistics_of(other), statistics_of(module))
    with pytest.raises(ValueError, match="29 running statistics do not fit a network that has 30"):
        set_statistics(other, statistics_of(module)[1:])


def test_a_network_without_norms_has_none():
    module = nn.Conv2d(3, 3, 1)
    assert len(statistics_of(module)) == 0
    estimate_apart(module, [(0, images(0))], 1, module)
    set_statistics(module, statistics_of(module))
