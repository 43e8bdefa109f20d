"""Percentiles of pre-activations are those of what a nonlinearity gets, and looking changes nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.norm import SyncBatchNorm
from pipeline.norm.preactivations import VALUES, Watch, chosen, layers


def images(seed: int = 0, n: int = 7, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def network(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    small = {"image_size": 16} if "mlp" in name else {"width": 0.125, "stem": "small"}
    return models.build(name, num_classes=5, norm=SyncBatchNorm, **small, **options)


@pytest.mark.parametrize("name", ["mlp", "bn_mlp"])
def test_percentiles_are_those_of_the_input_of_the_sigmoid(name):
    net = network(name)
    layer = net.hidden[2]
    seen: list[torch.Tensor] = []
    layer.activation = lambda x: seen.append(x.detach().clone()) or torch.sigmoid(x)
    watch = Watch(net, ["hidden.2.norm"])
    net(images())
    (found,) = watch.read().values()
    (given_NF,) = seen
    assert found.unit == 50
    assert found.of_unit == pytest.approx(np.percentile(given_NF[:, 50].numpy(), [15, 50, 85]), rel=1e-5)
    assert found.of_all == pytest.approx(np.percentile(given_NF.numpy(), [15, 50, 85]), rel=1e-5)


def test_norms_of_a_level_are_seen_before_their_fused_relu():
    net = network("bn_inception")
    watch = Watch(net, layers(net))
    net(images())
    found = watch.read()
    assert len(found) == 69
    for each in found.values():  # normalized, with gamma 1 and beta 0: a ReLU would leave nothing below zero
        low, middle, high = each.of_all
        assert low < -0.3
        assert -0.9 < middle < 0.9
        assert high > 0.3


def test_with_and_without_norm_layers_have_the_same_names():
    assert layers(network("mlp")) == layers(network("bn_mlp")) == [f"hidden.{i}.norm" for i in range(3)]
    bare, normalized = (layers(network(name, auxiliary_head=True)) for name in ("inception", "bn_inception"))
    assert bare == normalized
    assert bare[-1] == "body.5b.projection.norm"
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert layers(plain) == ["0"]
    assert chosen(bare, ["body.5b.*", "stem.0*"]) == [n for n in bare if n.startswith(("stem.0", "body.5b."))]


@pytest.mark.parametrize("name", ["mlp", "bn_mlp", "inception", "bn_inception"])
def test_looking_changes_no_bit(name):
    results = []
    for looks in (False, True):
        net = network(name)
        watch = Watch(net, layers(net) if looks else [])
        output = net(images())
        (output if isinstance(output, torch.Tensor) else output[0]).square().sum().backward()
        assert bool(watch.read()) == looks
        results.append([*(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_of_large_layers_a_sample_is_seen_that_spreads_over_images_rows_and_columns():
    norm = SyncBatchNorm(8)
    seen = Watch(nn.Sequential(norm), ["0"])
    x_NCHW = torch.randn(16, 8, 64, 64, generator=torch.Generator().manual_seed(1))
    y_NCHW = norm(x_NCHW)
    (sample_SC,) = seen._samples.values()
    assert VALUES / 2 < sample_SC.numel() <= VALUES
    (found,) = seen.read().values()
    assert found.of_all == pytest.approx(np.percentile(y_NCHW.detach().numpy(), [15, 50, 85]), abs=0.02)
    columns = torch.arange(64.0).expand(16, 8, 64, 64)
    norm.weight.data.zero_()
    norm.bias.data.fill_(3.0)
    norm(columns)
    assert next(iter(seen.read().values())).of_unit == (3.0, 3.0, 3.0)
    bare = nn.Sequential(nn.Identity())
    seen = Watch(bare, ["0"])
    bare(columns)
    assert next(iter(seen.read().values())).of_unit == pytest.approx((9.45, 31.5, 53.55), abs=1.0)


def test_neither_evaluation_nor_an_empty_share_nor_a_closed_watch_is_seen():
    for name in ("mlp", "bn_mlp"):
        net = network(name)
        watch = Watch(net, layers(net))
        net.eval()(images())
        assert watch.read() == {}
        net.train()(images(n=0))
        assert watch.read() == {}
        watch.close()
        net(images())
        assert watch.read() == {}
