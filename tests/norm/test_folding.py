import torch
from torch import nn

from pipeline import models
from pipeline.norm import SyncBatchNorm, convert, fold


def used(model: nn.Module) -> nn.Module:
    """The model with statistics and affine parameters that are not those it was born with."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            with torch.no_grad():
                module.running_mean.uniform_(-1, 1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.uniform_(-1, 1, generator=generator)
    return model.double().eval()


def test_folded_network_equals_the_network_and_has_no_norm_left():
    for stem in ("small", "separable"):
        model = used(models.build("bn_inception", num_classes=7, norm=SyncBatchNorm, width=0.25, stem=stem))
        folded = fold(model)
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(folded(x).main_NK, model(x).main_NK, rtol=1e-10, atol=1e-10)
        assert not any(isinstance(m, SyncBatchNorm) for m in folded.modules())
        biases = [m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
        assert len(biases) == 69  # one for each norm that went
        assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == 69  # the original is untouched


def test_torchvision_networks_fold_too():
    model = used(convert(models.build("resnet18", num_classes=5)))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, SyncBatchNorm) for m in fold(model).modules())


def test_a_norm_that_follows_no_convolution_stays():
    model = used(nn.Sequential(nn.ReLU(), SyncBatchNorm(3), nn.Conv2d(3, 4, 1, bias=True), SyncBatchNorm(4), nn.ReLU()))
    folded = fold(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert sum(isinstance(m, SyncBatchNorm) for m in folded.modules()) == 1


def test_fused_activation_survives_folding():
    model = used(nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, activation="relu")))
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-12, atol=1e-12)
