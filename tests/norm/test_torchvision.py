"""Whole networks of torchvision: converted, reverted, folded, and their checkpoints exchanged with torch's layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import models
from pipeline.norm import SyncBatchNorm, convert, fold, revert

# name -> norms, each of which folds into the convolution before it
NETWORKS = {"resnet50": 53, "inception_v3": 94, "efficientnet_b0": 49, "mobilenet_v3_large": 46}


@pytest.fixture(params=[n if n == "mobilenet_v3_large" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def network(request: pytest.FixtureRequest) -> nn.Module:
    """In float64, with statistics and affine parameters that are not those it was born with."""
    torch.manual_seed(0)
    made = models.build(request.param, num_classes=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (m for m in made.modules() if isinstance(m, _BatchNorm)):
            norm.running_mean.uniform_(-0.1, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.uniform_(-0.5, 0.5, generator=generator)
            norm.num_batches_tracked.fill_(7)
    made.name = request.param
    return made.double().eval()


def images(number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def kinds(network: nn.Module) -> dict[str, str]:
    return {name: f"{type(module)} {module!r}" for name, module in network.named_modules()}


def test_convert_and_revert_leave_kinds_tensors_and_outputs_as_they_were(network):
    before, tensors = kinds(network), {**dict(network.named_parameters()), **dict(network.named_buffers())}
    expected = network(images())
    converted = convert(network, group_size=1)
    assert sum(isinstance(m, SyncBatchNorm) for m in converted.modules()) == NETWORKS[network.name]
    assert not any(isinstance(m, _BatchNorm) for m in converted.modules())
    assert torch.equal(converted(images()), expected)
    reverted = revert(converted)
    assert kinds(reverted) == before
    after = {**dict(reverted.named_parameters()), **dict(reverted.named_buffers())}
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensor for name, tensor in tensors.items())  # the tensors themselves, not copies
    assert torch.equal(reverted(images()), expected)


def test_a_converted_network_trains_as_the_network(network):
    theirs, ours = network.train(), convert(copy.deepcopy(network), group_size=1).train()
    for m in (*theirs.modules(), *ours.modules()):
        if type(m).__name__ == "SampleDropout":
            m.p = 0.0
    for each in (theirs, ours):
        each(images(6)).square().sum().backward()
    # Some have no gradient but rounding, as a bias in front of another norm: what is compared with is the largest.
    scale = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-10 * scale, msg=name)
    for (name, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, msg=name)


def test_a_folded_network_has_no_norm_and_the_same_outputs(network):
    expected = network(images())
    folded = fold(convert(network))
    assert not any(isinstance(m, SyncBatchNorm | _BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(images()), expected, rtol=1e-9, atol=1e-9)


def test_checkpoints_go_both_ways_between_ours_batch_norm_and_torchs_synchronized_one(network):
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in torchs.modules())
    ours = convert(models.build(network.name, num_classes=5)).double()
    for source in (network, torchs):
        assert list(source.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(source.state_dict(), strict=True)
        again = nn.SyncBatchNorm.convert_sync_batchnorm(models.build(network.name, num_classes=5).double())
        again.load_state_dict(ours.state_dict(), strict=True)
        for name, value in source.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
            assert torch.equal(again.state_dict()[name], value), name
