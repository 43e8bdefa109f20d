"""The parts a model is made of: convolution units, the inception module run level by level, keyed dropout.

A norm is whatever `norm(channels)` returns; None means no normalization, and then convolutions keep
their bias. Units that do not depend on one another form a level, whose norms a norm class may treat
together (`begin_level`), so that synchronized norms exchange once a level, beside other work.
Legend: N images, C channels, H, W pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]
PlaceNormFactory = Callable[[tuple[int, int, int]], nn.Module]  # of single activations, of (C, H, W)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "sigmoid": torch.sigmoid}


class Style(NamedTuple):
    """What all units of one network share."""

    norm: NormFactory | None
    activation: str = "relu"
    count_padding: bool = False  # in average pools: padding then is zeros that are averaged, too

    def of_places(self, norm: PlaceNormFactory, height: int, width: int) -> Style:
        """The same with a norm of single activations, of a grid of that size."""
        return self._replace(norm=lambda channels: norm((channels, height, width)))


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


class Convolve(Protocol):
    """How a convolution is run on what a level gave out."""

    def __call__(self, conv: nn.Module, x: Tensor) -> Tensor: ...


class Begun(Protocol):
    """A level whose norms have begun: what `begin_level` of a norm class returns."""

    def room(self, channels: int) -> Tensor | None: ...

    def finish(self, places: Sequence[Tensor | None] = ()) -> list[Tensor]: ...

    def convolve(self, conv: nn.Module, x: Tensor) -> Tensor: ...


def plainly(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution that no level has a part in."""
    output: Tensor = conv(x)
    return output


class Level:
    """Units that do not depend on one another, from their convolutions' outputs on.

    Norms that know levels begin theirs here, and what is computed until `finish` runs beside their exchange; they
    apply a ReLU, too. followers: convolutions that the outputs go into; run by `convolve`, they may leave half of
    their backward to it.
    """

    def __init__(self, units: Sequence[Unit], convolved: Sequence[Tensor], followers: Sequence[nn.Module] = ()):
        self.units, self.convolved = units, convolved
        norms = [unit.norm for unit in units]
        begin = getattr(type(norms[0]), "begin_level", None) if norms[0].training else None
        plain_convs = [conv for conv in followers if type(conv) is nn.Conv2d]
        self._rectified = all(unit.activation is torch.relu for unit in units)
        activation = "relu" if self._rectified else None
        self._begun: Begun | None = begin(norms, convolved, plain_convs, activation) if begin else None
        self.convolve: Convolve = self._begun.convolve if self._begun else plainly

    def room(self, channels: int) -> Tensor | None:
        """A tensor whose slices outputs may be written to; None where they are made anew and then copied."""
        return self._begun.room(channels) if self._begun and self._rectified else None

    def finish(self, places: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """The units' outputs, each at its place in a room if it has one."""
        if self._begun is None:
            normalized = [unit.norm(x) for unit, x in zip(self.units, self.convolved, strict=True)]
        else:
            normalized = self._begun.finish(places)
            if self._rectified:
                return normalized
        return [unit.activation(x) for unit, x in zip(self.units, normalized, strict=True)]


class Joint:
    """The outputs of branches side by side. Where there is room they are written into it, and none is copied."""

    def __init__(self, room: Tensor | None, widths: list[int]):
        self.room, self.widths = room, widths
        self.places: list[Tensor | None] = [None] * len(widths) if room is None else list(torch.split(room, widths, 1))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """All parts along the channels, in their order; one that is not at its place is copied there."""
        if self.room is None:
            return torch.cat(list(parts), 1)
        whole: Tensor = _InPlace.apply(self.room, self.widths, *parts)
        return whole


class _InPlace(torch.autograd.Function):
    """A concatenation of what has been written there already."""

    @staticmethod
    def forward(ctx: Any, room: Tensor, widths: list[int], *parts: Tensor) -> Tensor:
        ctx.widths = widths
        for place, part in zip(torch.split(room, widths, 1), parts, strict=True):
            if place.data_ptr() != part.data_ptr():
                place.copy_(part)
        return room

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch.split(d_whole, ctx.widths, 1)


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
    """1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 -> 3x3 | pool -> 1x1, concatenated in this order.

    last: style of the units on the grid of the output, where it differs from that of the input's.
    """

    def __init__(self, inputs: int, widths: Widths, style: Style, last: Style | None = None):
        super().__init__()
        w, last = widths, last or style
        stride = 1 if w.projection else 2
        self.conv1 = Unit(inputs, w.conv1, 1, style) if w.conv1 else None
        self.reduce3 = Unit(inputs, w.reduce3, 1, style)
        self.conv3 = Unit(w.reduce3, w.conv3, 3, last, stride=stride)
        self.reduce33 = Unit(inputs, w.reduce33, 1, style)
        self.conv33a = Unit(w.reduce33, w.conv33, 3, style)
        self.conv33b = Unit(w.conv33, w.conv33, 3, last, stride=stride)
        self.pool: nn.Module
        if stride == 2:
            self.pool = HalvingPool()
        elif w.pool == "max":
            self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        else:
            self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=style.count_padding)
        self.projection = Unit(inputs, w.projection, 1, style) if w.projection else None
        self.widths = [width for width in (w.conv1, w.conv3, w.conv33, w.projection or inputs) if width]
        self.outputs = sum(self.widths)

    @property
    def entries(self) -> list[nn.Module]:
        """The convolutions of its input, one of them behind the pool."""
        units = (self.reduce3, self.reduce33, self.conv1, self.projection)
        return [unit.conv for unit in units if unit is not None]

    def forward(
        self, x_NCHW: Tensor, convolve: Convolve = plainly, followers: Sequence[nn.Module] = ()
    ) -> tuple[Tensor, Convolve]:
        """convolve: of the level that x comes from. followers: of the outputs; and how those are to be convolved."""
        reduced = [convolve(unit.conv, x_NCHW) for unit in (self.reduce3, self.reduce33)]
        level = Level([self.reduce3, self.reduce33], reduced, [self.conv3.conv, self.conv33a.conv])
        # What the next levels need of x is computed while this one's statistics are under way.
        units, outputs = [self.conv3, self.conv33a], [] if self.conv1 is None else [convolve(self.conv1.conv, x_NCHW)]
        three, double = level.finish()
        outputs = [level.convolve(self.conv3.conv, three), level.convolve(self.conv33a.conv, double), *outputs]
        units += [] if self.conv1 is None else [self.conv1]
        level = Level(units, outputs, [self.conv33b.conv])
        joint = Joint(level.room(self.outputs), self.widths)
        place_one = joint.places[: len(outputs) - 2]
        place_three, place_double, place_last = joint.places[len(place_one) :]

        pooled = self.pool(x_NCHW)
        last = [] if self.projection is None else [convolve(self.projection.conv, pooled)]
        three, double, *one = level.finish([place_three, None, *place_one])
        units = [self.conv33b] + ([] if self.projection is None else [self.projection])
        level = Level(units, [level.convolve(self.conv33b.conv, double), *last], followers)
        double, *projected = level.finish([place_double, place_last][: len(units)])
        return joint.joined([*one, three, double, *(projected or [pooled])]), level.convolve


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
