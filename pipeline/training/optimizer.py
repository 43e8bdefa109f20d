"""SGD with momentum; L2 on the weights of convolutions and linear layers, not on biases, gamma or beta."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(model: nn.Module, *, rate: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD over two groups of parameters, told apart by dimension: gamma, beta and biases are vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=rate, momentum=momentum)
