import torch

from pipeline import models
from pipeline.norm import SyncBatchNorm
from pipeline.training.optimizer import build_optimizer


def test_weight_decay_spares_biases_gamma_and_beta():
    model = models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, stem="small", width=0.125)
    optimizer = build_optimizer(model, rate=0.1, momentum=0.9, weight_decay=4e-5)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (4e-5, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert all("norm" in names[id(p)] or names[id(p)] == "classifier.bias" for p in spared["params"])
    assert len(decayed["params"]) == 69 + 1
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [len(g["params"]) for g in build_optimizer(model, rate=1, momentum=0, weight_decay=1).param_groups] == [1]
