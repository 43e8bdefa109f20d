"""BN-Inception: figure 5 of Ioffe & Szegedy 2015 as a table, and a loop over it.

`bn_inception` is the network of BN-Baseline, BN-x5 and BN-x30; `inception` the same without norm,
with biases. Default: 11,188,288 parameters, 1.935 G multiply-adds at 224x224, 69 norms in 33 levels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.blocks import (
    Convolve,
    HalvingPool,
    Inception,
    Level,
    NormFactory,
    PlaceNormFactory,
    SampleDropout,
    Style,
    Unit,
    Widths,
    plainly,
)

# Figure 5. 4c and 4d print a projection of 128, which contradicts their printed depth of 576: 96 fits the depth and
# the published 13.6e6 parameters; `literal_fig5` restores 128 (weights that circulate were trained with it).
#        1x1 | 3x3 reduce, 3x3 | double reduce, double | pool, projection
MODULES = {
    "3a": Widths(64, 64, 64, 64, 96, "avg", 32),
    "3b": Widths(64, 64, 96, 64, 96, "avg", 64),
    "3c": Widths(0, 128, 160, 64, 96, "max", 0),
    "4a": Widths(224, 64, 96, 96, 128, "avg", 128),
    "4b": Widths(192, 96, 128, 96, 128, "avg", 128),
    "4c": Widths(160, 128, 160, 128, 160, "avg", 96),
    "4d": Widths(96, 128, 192, 160, 192, "avg", 96),
    "4e": Widths(0, 128, 192, 192, 256, "max", 0),
    "5a": Widths(352, 192, 320, 160, 224, "avg", 128),
    "5b": Widths(352, 192, 320, 192, 224, "max", 128),
}
LITERAL_PROJECTION = {"4c": 128, "4d": 128}
STEMS = ("separable", "dense", "small")


class Logits(NamedTuple):
    """What a classifier returns: its logits (N, K), and those of its auxiliary head where it has one."""

    main_NK: Tensor
    auxiliary_NK: Tensor | None = None


class LocalResponseNorm(nn.Module):
    """x / (1 + 1e-4 mean of x^2 over 5 channels)^0.75, as GoogLeNet; nn.LocalResponseNorm's arithmetic.

    torch's own pools in three dimensions, whose backward on CUDA is refused where bits must repeat.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        channels = x_NCHW.shape[1]
        squares = nn.functional.pad(x_NCHW.square(), (0, 0, 0, 0, 2, 2))
        total = sum((squares[:, shift : shift + channels] for shift in range(1, 5)), squares[:, :channels])
        return x_NCHW / (1 + 1e-4 / 5 * total) ** 0.75


class AuxiliaryHead(nn.Module):
    """Average pool 5x5/3 -> 1x1 conv 128 -> 768 -> classes, on the output of 4d, in training only."""

    def __init__(self, inputs: int, num_classes: int, style: Style, width: float):
        super().__init__()
        reduced, hidden = _scaled(128, width), _scaled(768, width)
        self.reduce = Unit(inputs, reduced, 1, style)
        self.hidden = nn.Linear(reduced * 16, hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        # 5x5/3 on the 14x14 grid of a 224-pixel image; other grids are pooled to the same 4x4.
        pool = nn.functional.avg_pool2d(x_NCHW, 5, 3) if x_NCHW.shape[-1] == 14 else _adaptive_pool(x_NCHW, 4)
        hidden_NF = torch.relu(self.hidden(self.reduce(pool).flatten(1)))
        logits_NK: Tensor = self.classifier(hidden_NF)
        return logits_NK


class InceptionNetwork(nn.Module):
    """Stem, ten modules, global average pool, one linear layer. Input (N, 3, H, W).

    per_activation: last modules all of whose norms are of single activations, place_norm((C, H, W)). They bind the
    network to images of image_size pixels a side. The paper says "last hidden layers" and not which (section 4.2.3);
    1 is module 5b, 2 are 5a and 5b. Raises ValueError for an option that does not fit.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        norm: NormFactory | None,
        width: float = 1.0,
        stem: str = "separable",
        activation: str = "relu",
        dropout: float = 0.0,
        response_norm: bool = False,
        auxiliary_head: bool = False,
        literal_fig5: bool = False,
        count_padding: bool = False,
        initial_gain: float = 1.0,
        per_activation: int = 0,
        place_norm: PlaceNormFactory | None = None,
        image_size: int = 0,
    ):
        super().__init__()
        _check_per_activation(per_activation, norm, place_norm, image_size)
        if stem not in STEMS:
            raise ValueError(f"model.stem = {stem!r} is not a stem; choose one of {list(STEMS)}")
        if width <= 0:
            raise ValueError(
                f"model.width = {width} is not positive; 1.0 is the paper's, 0.25 a quarter of its channels"
            )
        style = Style(norm, activation, count_padding)
        self.stem = _stem(stem, style, width, response_norm)
        channels = _scaled(192, width)
        self.body = nn.ModuleDict()
        side = _side_after_stem(stem, image_size)
        for number, (name, printed) in enumerate(MODULES.items()):
            literal = literal_fig5 and name in LITERAL_PROJECTION
            widths = printed._replace(projection=LITERAL_PROJECTION[name]) if literal else printed
            first = last = style
            halved = side if widths.projection else _halved(side)
            if place_norm and number >= len(MODULES) - per_activation:
                first, last = (style.of_places(place_norm, each, each) for each in (side, halved))
            side = halved
            module = Inception(channels, _scaled_widths(widths, width), first, last)
            self.body[name], channels = module, module.outputs
            if name == "4d":
                auxiliary_inputs = channels
        self.dropout = SampleDropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        self.auxiliary = AuxiliaryHead(auxiliary_inputs, num_classes, style, width) if auxiliary_head else None
        initialize(self, initial_gain)

    def forward(self, x_NCHW: Tensor) -> Logits:
        x_NCHW, convolve = self._stem_of(x_NCHW)
        auxiliary_NK = None
        modules = list(self.body.items())
        for number, (name, module) in enumerate(modules):
            following = modules[number + 1][1].entries if number + 1 < len(modules) else ()
            x_NCHW, convolve = module(x_NCHW, convolve, following)
            if name == "4d" and self.auxiliary is not None and self.training:
                auxiliary_NK = self.auxiliary(x_NCHW)
        pooled_NC = x_NCHW.mean((2, 3))
        return Logits(self.classifier(self.dropout(pooled_NC)), auxiliary_NK)

    def _stem_of(self, x_NCHW: Tensor) -> tuple[Tensor, Convolve]:
        """The stem, each of its units a level; and how its output is to be convolved."""
        units = [part for part in self.stem if isinstance(part, Unit)]
        first: Any = next(iter(self.body.values()))
        followers = [*([unit.conv] for unit in units[1:]), first.entries]
        convolve: Convolve = plainly
        for part in self.stem:
            if isinstance(part, Unit):
                level = Level([part], [convolve(part.conv, x_NCHW)], followers[units.index(part)])
                (x_NCHW,), convolve = level.finish(), level.convolve
            else:
                x_NCHW = part(x_NCHW)
        return x_NCHW, convolve


def bn_inception(*, num_classes: int, norm: NormFactory, **options: object) -> InceptionNetwork:
    """The batch-normalized network; `norm(channels)` sits before every nonlinearity. Options: InceptionNetwork."""
    return InceptionNetwork(num_classes=num_classes, norm=norm, **options)  # type: ignore[arg-type]


def inception(*, num_classes: int, norm: NormFactory | None = None, **options: object) -> InceptionNetwork:
    """The paper's baseline: the same network without norm, with biases. `norm` is taken and left unused."""
    return InceptionNetwork(num_classes=num_classes, norm=None, **options)  # type: ignore[arg-type]


def initialize(network: nn.Module, gain: float) -> None:
    """Variance scaling by fan-in (He et al. 2015) for convolutions, times gain; 1 / fan-in for the linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            variance = 2 * gain**2 if isinstance(module, nn.Conv2d) else 1.0
            nn.init.trunc_normal_(module.weight, std=math.sqrt(variance / fan_in), a=-10, b=10)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check_per_activation(
    modules: int, norm: NormFactory | None, place_norm: PlaceNormFactory | None, image_size: int
) -> None:
    if not 0 <= modules <= len(MODULES):
        raise ValueError(
            f"model.per_activation = {modules} is no number of last modules; give 0 (none) to {len(MODULES)}, "
            "1 = 5b, 2 = 5a and 5b"
        )
    if modules and (norm is None or place_norm is None):
        raise ValueError(
            f"model.per_activation = {modules} asks for norms, and this network is built without; choose bn_inception, "
            "or leave it at 0"
        )
    if modules and image_size < 1:
        raise ValueError(
            f"model.per_activation = {modules} binds the network to images of one size, which is not given; set "
            "image_size (data.image_size of a run), or leave it at 0"
        )


def _halved(side: int) -> int:
    """What a stride of 2 leaves of a side."""
    return -(-side // 2)


def _side_after_stem(kind: str, image_size: int) -> int:
    """Pixels a side of what the first module gets."""
    return _halved(image_size) if kind == "small" else _halved(_halved(_halved(image_size)))


def _stem(kind: str, style: Style, width: float, response_norm: bool) -> nn.Sequential:
    first, middle, last = _scaled(64, width), _scaled(64, width), _scaled(192, width)
    bias = style.norm is None
    if kind == "separable":  # depth multiplier 8: 7x7/2 from 3 to 24 channels, then 1x1, nothing in between
        depthwise = nn.Conv2d(3, 24, 7, stride=2, padding=3, groups=3, bias=False)
        separable = nn.Sequential(depthwise, nn.Conv2d(24, first, 1, bias=bias))
        opening = Unit(3, first, 7, style, conv=separable)
    elif kind == "dense":
        opening = Unit(3, first, 7, style, stride=2)
    else:  # for images of 16 to 64 pixels: no stride and no first pool, so that 3a sees half the image's side
        opening = Unit(3, first, 3, style)
    parts: list[nn.Module] = [opening]
    if kind != "small":
        parts.append(HalvingPool())
    if response_norm:
        parts.append(LocalResponseNorm())
    parts += [Unit(first, middle, 1, style), Unit(middle, last, 3, style)]
    if response_norm:
        parts.append(LocalResponseNorm())
    parts.append(HalvingPool())
    return nn.Sequential(*parts)


def _scaled(channels: int, width: float) -> int:
    """Channels times width, to the nearest multiple of 8 and at least 8; exact at width 1."""
    return max(8, 8 * round(channels * width / 8)) if channels else 0


def _scaled_widths(widths: Widths, width: float) -> Widths:
    scaled: dict[str, Any] = {name: _scaled(w, width) for name, w in widths._asdict().items() if isinstance(w, int)}
    return widths._replace(**scaled)


def _adaptive_pool(x_NCHW: Tensor, side: int) -> Tensor:
    """adaptive_avg_pool2d as two matrix products: its own backward on CUDA adds up in any order."""
    rows, columns = (_bins(length, side).to(x_NCHW) for length in x_NCHW.shape[2:])
    return torch.einsum("nchw,ih,jw->ncij", x_NCHW, rows, columns)


def _bins(length: int, side: int) -> Tensor:
    """(side, length): row i averages the values from i length / side to (i + 1) length / side, rounded outward."""
    bins = torch.zeros(side, length)
    for i in range(side):
        first, end = i * length // side, -(-(i + 1) * length // side)
        bins[i, first:end] = 1 / (end - first)
    return bins
