"""Weights of others' BN-Inception under our names and back: the layout of yjxiong's Caffe port and Cadene's of it.

Theirs: dense stem, projections of 128 (literal_fig5), padding counted in average pools, eps 1e-5, BGR in 0..255 less a
mean, and a bias in every convolution. Ours has none before a norm: gamma (x + b - mean) / sqrt(var + eps) + beta is
the same function with mean - b for the mean. Both halve even sides alike (224 down to 7); at odd ones our pools pad on
both sides. The arithmetic is float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models.inception import MODULES

EPS = 1e-5
MEAN_BGR = (104.0, 117.0, 128.0)  # of the weights that circulate, in 0..255
OPTIONS = {"stem": "dense", "literal_fig5": True, "count_padding": True}  # of ours that their weights need
_FIRST = "conv1_7x7_s2"
_LAST = ("last_linear", "fc")  # the second in older files
_OURS_LAST = "classifier"
_STEM = {_FIRST: "stem.0", "conv2_3x3_reduce": "stem.2", "conv2_3x3": "stem.3"}
_BRANCHES = {
    "1x1": "conv1", "3x3_reduce": "reduce3", "3x3": "conv3", "double_3x3_reduce": "reduce33",
    "double_3x3_1": "conv33a", "double_3x3_2": "conv33b", "pool_proj": "projection",
}  # fmt: skip
_NORM = ("weight", "bias", "running_mean", "running_var")
_TRACKED = "num_batches_tracked"  # older files have none


class LayoutError(ValueError):
    """Weights that are not those of the layout: the message lists what is missing and what is left over."""


class Mapped(NamedTuple):
    """One layer of a file: its name there, its name here, the shape of its weights, and what was done to it."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    how: str


def is_cadene(names: Collection[str]) -> bool:
    return f"{_FIRST}.weight" in names


def units() -> Iterator[tuple[str, str]]:
    """Their name of each convolution (its norm has _bn behind it) and ours of the unit, as the network runs them."""
    yield from _STEM.items()
    for name, widths in MODULES.items():
        absent = {branch for branch, width in (("1x1", widths.conv1), ("pool_proj", widths.projection)) if not width}
        for branch, ours in _BRANCHES.items():
            if branch not in absent:
                yield f"inception_{name}_{branch}", f"body.{name}.{ours}"


def from_cadene(theirs: Mapping[str, Tensor], std: Sequence[float]) -> tuple[dict[str, Tensor], list[Mapped]]:
    """Tensors under our names, for a network of OPTIONS and EPS, and a row for each layer.

    std: of pixels in 0..1 in red, green and blue, by which our input is divided; its mean must be theirs
    (`mean_of`). Raises LayoutError.
    """
    last = next((name for name in _LAST if f"{name}.weight" in theirs), _LAST[0])
    _check(theirs, last)
    ours: dict[str, Tensor] = {}
    rows: list[Mapped] = []
    for there, here in units():
        weight = theirs[f"{there}.weight"].double()
        how = "bias taken off the running mean"
        if there == _FIRST:
            weight, how = weight.flip(1) * _scale(std), f"BGR to RGB, 0..255 to our scale, {how}"
        ours[f"{here}.conv.weight"] = weight.float()
        for name in _NORM:  # older files keep them as (1, C)
            ours[f"{here}.norm.{name}"] = theirs[f"{there}_bn.{name}"].reshape(-1).float()
        mean = theirs[f"{there}_bn.running_mean"].reshape(-1).double() - theirs[f"{there}.bias"].double()
        ours[f"{here}.norm.running_mean"] = mean.float()
        ours[f"{here}.norm.{_TRACKED}"] = theirs.get(f"{there}_bn.{_TRACKED}", torch.tensor(0)).reshape(())
        rows.append(Mapped(f"{there}, {there}_bn", here, tuple(weight.shape), how))
    for name in ("weight", "bias"):
        ours[f"{_OURS_LAST}.{name}"] = theirs[f"{last}.{name}"].float()
    rows.append(Mapped(last, _OURS_LAST, tuple(theirs[f"{last}.weight"].shape), "as it is"))
    return ours, rows


def to_cadene(ours: Mapping[str, Tensor], std: Sequence[float], eps: float) -> tuple[dict[str, Tensor], list[Mapped]]:
    """The inverse, of a network of OPTIONS whose norms add eps: biases are 0, what eps has more than theirs goes into
    the variance. Raises LayoutError for another network.
    """
    theirs: dict[str, Tensor] = {}
    rows: list[Mapped] = []
    expected = {f"{here}.{name}" for _, here in units() for name in ("conv.weight", *(f"norm.{n}" for n in _NORM))}
    expected |= {f"{_OURS_LAST}.weight", f"{_OURS_LAST}.bias"}
    found = {name for name in ours if not name.endswith(_TRACKED) and not name.startswith("auxiliary.")}
    if eps < EPS or found != expected:
        raise LayoutError(
            f"the network is not of Cadene's layout ({_listed(expected - found, found - expected)}, eps {eps:g}): it "
            "must be bn_inception with model.stem=dense model.literal_fig5=true model.count_padding=true, no response "
            "norm, and norm.eps of 1e-5 or more"
        )
    for there, here in units():
        weight = ours[f"{here}.conv.weight"].double()
        how = "bias 0" if eps == EPS else f"bias 0, {eps - EPS:g} added to the running variance"
        if there == _FIRST:
            weight, how = (weight / _scale(std)).flip(1), f"RGB to BGR, our scale to 0..255, {how}"
        theirs[f"{there}.weight"] = weight.float()
        theirs[f"{there}.bias"] = torch.zeros(len(weight))
        for name in _NORM:
            theirs[f"{there}_bn.{name}"] = ours[f"{here}.norm.{name}"].float()
        variance = ours[f"{here}.norm.running_var"].double() + (eps - EPS)
        theirs[f"{there}_bn.running_var"] = variance.float()
        theirs[f"{there}_bn.{_TRACKED}"] = ours[f"{here}.norm.{_TRACKED}"]
        rows.append(Mapped(f"{there}, {there}_bn", here, tuple(weight.shape), how))
    for name in ("weight", "bias"):
        theirs[f"{_LAST[0]}.{name}"] = ours[f"{_OURS_LAST}.{name}"].float()
    rows.append(Mapped(_LAST[0], _OURS_LAST, tuple(ours[f"{_OURS_LAST}.weight"].shape), "as it is"))
    return theirs, rows


def mean_of(mean_bgr: Sequence[float] = MEAN_BGR) -> list[float]:
    """data.mean for their mean: of pixels in 0..1, in red, green and blue."""
    return [value / 255 for value in reversed(mean_bgr)]


def _scale(std: Sequence[float]) -> Tensor:
    """How much larger a pixel of 0..255 is than our input, per colour, as the first weights have them."""
    return 255 * torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)


def _check(theirs: Mapping[str, Tensor], last: str) -> None:
    expected = {f"{there}.{name}" for there, _ in units() for name in ("weight", "bias")}
    expected |= {f"{there}_bn.{name}" for there, _ in units() for name in _NORM}
    expected |= {f"{last}.weight", f"{last}.bias"}
    found = {name for name in theirs if not name.endswith(_TRACKED)}
    if found != expected:
        raise LayoutError(f"BN-Inception in Cadene's layout, but {_listed(expected - found, found - expected)}")


def _listed(missing: Collection[str], left: Collection[str]) -> str:
    return f"{len(missing)} missing{_names(missing)}, {len(left)} left over{_names(left)}"


def _names(names: Collection[str]) -> str:
    shown = sorted(names)[:8]
    return f" ({', '.join(shown)}{', ...' if len(names) > len(shown) else ''})" if names else ""
