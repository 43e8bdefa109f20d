"""The fully connected network of Ioffe & Szegedy 2015, section 4.1 and figure 1: 784-100-100-100-10 on MNIST.

`bn_mlp` has a norm before every nonlinearity, `mlp` has biases instead. The last layer is not normalized.
Legend: N images, D inputs, F features.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from pipeline.models.blocks import ACTIVATIONS, NormFactory, SampleDropout

HIDDEN = (100, 100, 100)


class Dense(nn.Module):
    """Linear -> norm -> nonlinearity; the bias exists only where no norm subsumes it (paper, 3.2)."""

    def __init__(self, inputs: int, outputs: int, norm: NormFactory | None, activation: str):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=norm is None)
        self.norm = norm(outputs) if norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_ND: Tensor) -> Tensor:
        output_NF: Tensor = self.activation(self.norm(self.linear(x_ND)))
        return output_NF


class DenseNetwork(nn.Module):
    """Hidden layers of 100 units each, and a linear one. Input (N, 3, H, W), of which it sees the grey image.

    initial_gain: weights are Gaussian with a standard deviation of gain / sqrt(fan-in). The paper says "small".
    """

    def __init__(
        self,
        *,
        num_classes: int,
        norm: NormFactory | None,
        image_size: int,
        activation: str = "sigmoid",
        dropout: float = 0.0,
        initial_gain: float = 1.0,
    ):
        super().__init__()
        widths = (image_size**2, *HIDDEN)
        self.hidden = nn.ModuleList(Dense(inputs, outputs, norm, activation) for inputs, outputs in pairwise(widths))
        self.dropout = SampleDropout(dropout)
        self.classifier = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=initial_gain / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_ND = x_NCHW.mean(1).flatten(1)
        for layer in self.hidden:
            x_ND = layer(x_ND)
        logits_NK: Tensor = self.classifier(self.dropout(x_ND))
        return logits_NK


def bn_mlp(*, num_classes: int, norm: NormFactory, **options: object) -> DenseNetwork:
    """With `norm(features)` before every nonlinearity. Options: DenseNetwork."""
    return DenseNetwork(num_classes=num_classes, norm=norm, **options)  # type: ignore[arg-type]


def mlp(*, num_classes: int, norm: NormFactory | None = None, **options: object) -> DenseNetwork:
    """The same without norm, with biases. `norm` is taken and left unused."""
    return DenseNetwork(num_classes=num_classes, norm=None, **options)  # type: ignore[arg-type]
