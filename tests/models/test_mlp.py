"""The fully connected network is the paper's, with and without norms."""

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.norm import SyncBatchNorm, fold


@pytest.mark.parametrize(
    ("name", "parameters"),
    # 784x100 + 100x100 + 100x100 + 100x10 weights, 10 last biases, and 100 biases or 200 gammas and betas a layer
    [("mlp", 78_400 + 20_000 + 1_000 + 10 + 300), ("bn_mlp", 78_400 + 20_000 + 1_000 + 10 + 600)],
)
def test_it_is_784_100_100_100_10(name, parameters):
    network = models.build(name, num_classes=10, norm=SyncBatchNorm, image_size=28)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
    assert sum(isinstance(m, SyncBatchNorm) for m in network.modules()) == (3 if name == "bn_mlp" else 0)


def test_it_sees_the_grey_image():
    network = models.build("mlp", num_classes=10, image_size=4).eval()
    grey_N1HW = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    colour_NCHW = grey_N1HW + torch.tensor([-0.5, 0.0, 0.5])[:, None, None]
    torch.testing.assert_close(network(grey_N1HW.expand(3, 3, 4, 4)), network(colour_NCHW), rtol=1e-5, atol=1e-6)


def test_weights_are_small_gaussians_of_the_gain():
    torch.manual_seed(0)
    for gain in (0.5, 1.0):
        network = models.build("mlp", num_classes=10, image_size=28, initial_gain=gain)
        for layer in [each for each in network.modules() if isinstance(each, nn.Linear)]:
            assert layer.weight.std().item() * layer.in_features**0.5 == pytest.approx(gain, rel=0.05)
            assert layer.bias.count_nonzero() == 0


def test_its_norms_fold_into_the_linear_layers_before_them():
    network = models.build("bn_mlp", num_classes=10, norm=SyncBatchNorm, image_size=4)
    x_NCHW = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    network(x_NCHW)
    expected_NK = network.eval()(x_NCHW)
    torch.testing.assert_close(fold(network)(x_NCHW), expected_NK, rtol=1e-5, atol=1e-6)
