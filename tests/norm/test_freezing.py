import copy

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.norm import SyncBatchNorm, freeze
from pipeline.norm.population import estimate, merge_groups


def network() -> nn.Module:
    torch.manual_seed(0)
    made = models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, width=0.125, stem="small")
    generator = torch.Generator().manual_seed(1)
    for norm in (m for m in made.modules() if isinstance(m, SyncBatchNorm)):
        norm.running_mean.uniform_(-0.1, 0.1, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    return made


def images(number: int) -> torch.Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(number))


def test_frozen_statistics_serve_in_training_and_stay():
    model = network()
    expected = copy.deepcopy(model).eval()(images(4)).main_NK
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert freeze(model, "statistics") == 69
    model.train()
    assert model.training
    torch.testing.assert_close(model(images(4)).main_NK, expected, rtol=0, atol=0)
    # An image's output depends on that image alone.
    torch.testing.assert_close(model(images(4)[:1]).main_NK, expected[:1], rtol=1e-4, atol=1e-5)
    assert estimate(model, [images(4)], model) == 0
    merge_groups(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_gamma_and_beta_are_trained_unless_all_is_frozen():
    for what, trained in (("statistics", True), ("all", False)):
        model = network()
        freeze(model, what)
        model.train()(images(4)).main_NK.square().sum().backward()
        norms = [m for m in model.modules() if isinstance(m, SyncBatchNorm)]
        assert all((norm.weight.grad is not None) == trained for norm in norms)
        assert all(p.grad is not None for m in model.modules() if isinstance(m, nn.Conv2d) for p in m.parameters())


def test_a_frozen_norm_has_the_gradient_of_torchs_in_evaluation_mode():
    ours, theirs = SyncBatchNorm(5, eps=1e-3).double(), nn.BatchNorm2d(5, eps=1e-3).double().eval()
    for norm in (ours, theirs):
        norm.running_mean.copy_(torch.arange(5) / 3)
        norm.running_var.copy_(torch.arange(5) + 0.5)
    freeze(ours, "statistics")
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for norm in (ours.train(), theirs):
        given = x.clone().requires_grad_()
        norm(given).square().sum().backward()
        gradients.append((given.grad, norm.weight.grad, norm.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(ValueError, match="what = 'mean' is not offered; choose one of"):
        freeze(network(), "mean")
    with pytest.raises(ValueError, match="keeps no running statistics, and cannot be frozen"):
        freeze(nn.Sequential(SyncBatchNorm(3, track_running_stats=False)), "all")
