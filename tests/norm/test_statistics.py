"""Statistics that a module is lent change what it says, and nothing of it."""

import pytest
import torch

from pipeline import models
from pipeline.norm import SyncBatchNorm
from pipeline.norm.statistics import held, kept, statistics_among
from tests.multiprocess.ranks import run_ranks, with_group


def test_a_module_evaluates_with_what_it_is_given_and_then_with_its_own():
    torch.manual_seed(0)
    model = models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, stem="small", width=0.125).eval()
    x = torch.randn(2, 3, 16, 16)
    before, own = model(x).main_NK, kept(model)
    others = {name: value + 0.5 for name, value in own.items()}
    with held(model, others):
        assert not torch.equal(model(x).main_NK, before)
        assert all(torch.equal(value, others[name]) for name, value in kept(model).items())
    assert torch.equal(model(x).main_NK, before)
    assert own.keys() == statistics_among(model.state_dict()).keys()
    assert len(own) == 138
    with pytest.raises(ValueError, match=r"137 statistics are missing, stem\.0\.norm\.running_var the first"), \
            held(model, dict(list(own.items())[:1])):  # fmt: skip
        pass
    assert torch.equal(model(x).main_NK, before)


def rank_of_groups(rank, world):
    norm = SyncBatchNorm(2, group_size=1, momentum=1.0).double()
    norm(torch.full((3, 2), float(rank)).double())
    return {name: value.numpy() for name, value in kept(norm).items()}


def test_of_groups_of_ranks_the_mean_is_kept():
    for found in run_ranks(2, with_group, rank_of_groups):
        assert found["running_mean"].tolist() == [0.5, 0.5]
