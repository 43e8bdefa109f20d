"""Optimizers by name, over two groups of parameters: L2 is for the weights of convolutions and linear layers alone.

sgd is torch's; lars (You, Gitman & Ginsburg 2017) and lamb (You et al. 2020, NVIDIA's form) are timm's. Their trust
ratio, |w| / |update| of each weight, is for the same weights: gamma, beta and biases are vectors near zero, whose
ratio would be noise. All three repeat their bits, keep their state with the parameters in order, and change no
gradient in place, so that views of DDP's buckets are safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OPTIMIZERS = ("sgd", "lars", "lamb")
RATE = 1.0  # before the first step: the schedule multiplies it, and so gives the rate itself


@dataclass(frozen=True, slots=True)
class Descent:
    """Which optimizer, and its constants. momentum: of the gradient; lamb's first beta. nesterov: not of lamb.

    trust_coefficient: of lars, on |w| / |gradient + L2|. trust_clip: lars then lowers the rate and never raises it
    (LARC); lamb's ratio is at most 1. second_momentum: lamb's second beta. lamb also divides the gradient of all
    parameters by its norm where that is above 1.
    """

    name: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    trust_coefficient: float = 0.001
    trust_clip: bool = False
    second_momentum: float = 0.999


def build_optimizer(model: nn.Module, descent: Descent) -> torch.optim.Optimizer:
    """The optimizer of a model's trained parameters; the groups are told apart by dimension."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": descent.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if descent.name != "sgd":  # timm would leave the ratio out where there is no L2, weights included
        groups[0]["always_adapt"], groups[1]["always_adapt"] = True, False
    groups = [group for group in groups if group["params"]]
    if descent.name == "sgd":
        return torch.optim.SGD(groups, lr=RATE, momentum=descent.momentum, nesterov=descent.nesterov)
    # Not at the top: timm takes 2.4 s to import, torchvision included.
    from timm.optim.lamb import Lamb
    from timm.optim.lars import Lars

    built: torch.optim.Optimizer
    if descent.name == "lars":
        built = Lars(groups, lr=RATE, momentum=descent.momentum, nesterov=descent.nesterov,
                     trust_coeff=descent.trust_coefficient, trust_clip=descent.trust_clip)  # fmt: skip
    else:
        built = Lamb(groups, lr=RATE, betas=(descent.momentum, descent.second_momentum), trust_clip=descent.trust_clip)
    return built
