import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.models.blocks import SampleDropout


def test_any_torchvision_classifier_is_built_by_its_name():
    for name in ("mobilenet_v3_small", "googlenet"):
        model = models.build(name, num_classes=7).eval()
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_its_dropout_is_keyed_by_sample_and_may_be_set():
    own = models.build("mobilenet_v3_small", num_classes=7)
    assert [m.p for m in own.modules() if isinstance(m, SampleDropout)] == [0.2]
    assert not any(type(m) is nn.Dropout for m in own.modules())
    none = models.build("mobilenet_v3_small", num_classes=7, dropout=0.0)
    assert [m.p for m in none.modules() if isinstance(m, SampleDropout)] == [0.0]


def test_stochastic_depth_is_keyed_by_sample_too():
    model = models.build("efficientnet_b0", num_classes=3)
    depths = [m for m in model.modules() if isinstance(m, SampleDropout) and m.whole]
    assert len(depths) == 16
    assert not any(type(m).__name__ == "StochasticDepth" for m in model.modules())
    layer, x = SampleDropout(0.5, whole=True), torch.ones(64, 3, 2, 2)
    layer.key_N = torch.arange(64)
    kept = layer(x)
    assert set(kept.flatten(1).unique(dim=1).flatten().tolist()) == {0.0, 2.0}  # an image is kept or dropped whole


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match=r"model.name = 'resnet81' is not a model; did you mean 'resnet18'\?"):
        models.build("resnet81", num_classes=2)


def test_options_of_our_networks_are_refused_for_torchvision():
    with pytest.raises(ValueError, match="it takes dropout and zero_gamma"):
        models.build("resnet18", num_classes=2, width=0.5)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match=r"model\.stem = 'tiny' is not a stem"):
        models.build("bn_inception", num_classes=2, norm=nn.BatchNorm2d, stem="tiny")


def test_residual_branches_may_begin_as_nothing():
    plain, zero = (models.build("resnet18", num_classes=3, zero_gamma=z) for z in (False, True))
    last = [m for name, m in zero.named_modules() if name.endswith("bn2")]
    assert len(last) == 8
    assert all((norm.weight == 0).all() for norm in last)
    assert not any((m.weight == 0).any() for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(ValueError, match=r"model\.zero_gamma = true: torchvision's mobilenet_v3_small has no such"):
        models.build("mobilenet_v3_small", num_classes=3, zero_gamma=True)
