"""The parts a model is made of: convolution units, the inception module run level by level, keyed dropout.

A norm is whatever `norm(channels)` returns; None means no normalization, and then convolutions keep
their bias. Units at the same distance from a module's input form a level, whose norms a norm class
may treat together (`forward_level`), so that synchronized norms exchange once a level.
Legend: N images, C channels, H, W pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "sigmoid": torch.sigmoid}


class Style(NamedTuple):
    """What all units of one network share."""

    norm: NormFactory | None
    activation: str = "relu"


class Unit(nn.Module):
    """Convolution -> norm -> nonlinearity; the bias exists only where no norm subsumes it (paper, 3.2)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, style: Style, *, stride: int = 1, conv: nn.Module | None = None
    ):
        super().__init__()
        self.conv = conv or nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=style.norm is None
        )
        self.norm = style.norm(outputs) if style.norm else nn.Identity()
        self.activation = ACTIVATIONS[style.activation]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        output_NCHW: Tensor = self.activation(self.norm(self.conv(x_NCHW)))
        return output_NCHW


def forward_level(units: Sequence[Unit], xs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of units that do not depend on one another, their norms taken together where the class can."""
    convolved = [unit.conv(x) for unit, x in zip(units, xs, strict=True)]
    norms = [unit.norm for unit in units]
    together = getattr(type(norms[0]), "forward_level", None)
    normalized = together(norms, convolved) if together else [n(x) for n, x in zip(norms, convolved, strict=True)]
    return [unit.activation(x) for unit, x in zip(units, normalized, strict=True)]


class HalvingPool(nn.Module):
    """3x3/2 max pool to ceil(side / 2), as a 3x3/2 convolution padded by 1 gives: the two meet in a concatenation.

    On even sides that is ceil mode without padding (Fig. 5's grids); an odd side needs one pixel on both sides.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        padding = (x_NCHW.shape[2] % 2, x_NCHW.shape[3] % 2)
        return nn.functional.max_pool2d(x_NCHW, 3, stride=2, padding=padding, ceil_mode=True)


class Widths(NamedTuple):
    """Channels of one module: a row of the paper's figure 5. A zero leaves the branch out."""

    conv1: int
    reduce3: int
    conv3: int
    reduce33: int
    conv33: int
    pool: str  # "avg" or "max"
    projection: int  # 0: the pool is passed through, and the module has stride 2


class Inception(nn.Module):
    """1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 -> 3x3 | pool -> 1x1, concatenated in this order."""

    def __init__(self, inputs: int, widths: Widths, style: Style):
        super().__init__()
        w = widths
        stride = 1 if w.projection else 2
        self.conv1 = Unit(inputs, w.conv1, 1, style) if w.conv1 else None
        self.reduce3 = Unit(inputs, w.reduce3, 1, style)
        self.conv3 = Unit(w.reduce3, w.conv3, 3, style, stride=stride)
        self.reduce33 = Unit(inputs, w.reduce33, 1, style)
        self.conv33a = Unit(w.reduce33, w.conv33, 3, style)
        self.conv33b = Unit(w.conv33, w.conv33, 3, style, stride=stride)
        self.pool: nn.Module
        if stride == 2:
            self.pool = HalvingPool()
        elif w.pool == "max":
            self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        else:
            self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.projection = Unit(inputs, w.projection, 1, style) if w.projection else None
        self.outputs = w.conv1 + w.conv3 + w.conv33 + (w.projection or inputs)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        pooled = self.pool(x_NCHW)
        if self.conv1 is None or self.projection is None:
            three, double = forward_level([self.reduce3, self.reduce33], [x_NCHW] * 2)
            three, double = forward_level([self.conv3, self.conv33a], [three, double])
            (double,) = forward_level([self.conv33b], [double])
            return torch.cat([three, double, pooled], 1)
        level = [self.conv1, self.reduce3, self.reduce33, self.projection]
        one, three, double, pooled = forward_level(level, [x_NCHW, x_NCHW, x_NCHW, pooled])
        three, double = forward_level([self.conv3, self.conv33a], [three, double])
        (double,) = forward_level([self.conv33b], [double])
        return torch.cat([one, three, double, pooled], 1)


class SampleDropout(nn.Module):
    """Dropout whose mask is a function of (sample key, layer, feature): the same for any split over ranks.

    `set_sample_keys` hands over one int64 key per image before a training forward pass; the layer
    number tells several such layers of a model apart. whole: an image's features are dropped together
    (stochastic depth). Input (N, *).
    """

    def __init__(self, p: float, layer: int = 0, *, whole: bool = False):
        super().__init__()
        self.p, self.layer, self.whole = p, layer, whole
        self.key_N: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.key_N is None or len(self.key_N) != len(x):
            raise RuntimeError(
                f"SampleDropout {self.layer} has keys for {0 if self.key_N is None else len(self.key_N)} of "
                f"{len(x)} images; call set_sample_keys(model, key_N) before a training forward pass"
            )
        if not len(x):
            return x
        features = 1 if self.whole else x[0].numel()
        counter_F = torch.arange(features, device=x.device) + (self.layer << 40)
        bits_NF = _mixed(_mixed(self.key_N.to(x.device))[:, None] ^ counter_F)
        kept_NF = ((bits_NF >> 11) & (2**53 - 1)).double() >= self.p * 2.0**53
        kept = kept_NF.view([len(x)] + [1] * (x.dim() - 1) if self.whole else x.shape)
        return x * kept.to(x.dtype) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


def set_sample_keys(model: nn.Module, key_N: Tensor) -> None:
    """Keys of the images of the next training forward pass, int64, for every SampleDropout of the model."""
    for module in model.modules():
        if isinstance(module, SampleDropout):
            module.key_N = key_N


def _mixed(bits: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014) on int64, wrapping; shifts made logical by a mask."""
    bits = (bits + _signed(0x9E3779B97F4A7C15)) & -1
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return bits ^ ((bits >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
