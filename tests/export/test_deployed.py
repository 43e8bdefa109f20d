"""What is exported: nothing that trains, norms folded, in float32, whatever was trained."""

import torch
from torch import nn

from pipeline import models
from pipeline.export.deployed import Deployed, folded, stripped
from pipeline.export.description import NORMALIZED, PIXELS
from pipeline.norm import SyncBatchNorm, freeze


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    return models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, width=0.125, stem="small", **options)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_frozen_norms_fold_as_others_do():
    model = network()
    expected = model.eval()(images()).main_NK
    freeze(model, "all")
    bare = folded(model)
    assert not any(isinstance(m, SyncBatchNorm) for m in bare.modules())
    torch.testing.assert_close(bare(images()).main_NK, expected, rtol=1e-4, atol=1e-6)


def test_what_is_stripped_is_a_copy_without_the_auxiliary_head_and_needs_no_gradient():
    model = network(auxiliary_head=True).double().train()
    bare = stripped(model)
    assert not any(name.startswith("auxiliary") for name in bare.state_dict())
    assert not any(p.requires_grad for p in bare.parameters())
    assert {p.dtype for p in bare.parameters()} == {torch.float32}
    assert not bare.training
    assert model.training
    assert any(name.startswith("auxiliary") for name in model.state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_network_without_norms_is_not_traced():
    class Choosing(nn.Linear):
        def forward(self, input):
            return super().forward(input) if input.sum() > 0 else input[:, :1]

    network = Choosing(3, 1)  # which nothing that traces could follow
    assert torch.equal(folded(network).weight, network.weight)


def test_pixels_and_what_normalized_makes_of_them_give_the_same_logits():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    pixels, normal = (Deployed(folded(network()), mean, std, takes).eval() for takes in (PIXELS, NORMALIZED))
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(pixels(image), normal(pixels.normalized(image)))
