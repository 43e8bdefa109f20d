"""Percentiles of what goes into the nonlinearities of a network: Ioffe & Szegedy 2015, figure 1 b and c.

A pre-activation is the output of a norm, or where the network has none, of what takes its place. It is read off a
sample of this rank's batch, which is normalized once more beside the training: nothing that trains is touched, and
nothing is exchanged.   Legend: N images, C units or channels, S sampled values of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.norm import normalization
from pipeline.norm.normalization import Statistics
from pipeline.norm.per_activation import PerActivationNorm
from pipeline.norm.sync_batch_norm import SyncBatchNorm

PERCENTS = (15, 50, 85)
VALUES = 65_536  # of a layer that are looked at: the error of its percentiles is below a hundredth of a deviation


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The 15th, 50th and 85th percentile of the layer's middle unit, and over all its units."""

    unit: int
    of_unit: tuple[float, float, float]
    of_all: tuple[float, float, float]


def layers(module: nn.Module) -> list[str]:
    """Names of the layers whose outputs are pre-activations, in the order of the module.

    Those are its norms, and where it has none the places kept for them (nn.Identity called norm), or else every
    convolution and linear layer but the last. Of an auxiliary head there is none.
    """
    named = [(name, each) for name, each in module.named_modules() if not name.startswith("auxiliary.")]
    found = [name for name, each in named if isinstance(each, SyncBatchNorm)]
    found = found or [
        name for name, each in named if isinstance(each, nn.Identity) and name.rpartition(".")[2] == "norm"
    ]
    return found or [name for name, each in named if isinstance(each, nn.Conv2d | nn.Linear)][:-1]


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those that one of the patterns fits, as "body.5*" does."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


class Watch:
    """Pre-activations of layers of a module as of its last training batch."""

    def __init__(self, module: nn.Module, names: Sequence[str]):
        self._samples: dict[str, Tensor] = {}
        self._units: dict[str, int] = {}  # of a layer of which not every unit is sampled, the distance between two
        self._ends: list[Callable[[], None]] = []
        for name in names:
            layer = module.get_submodule(name)
            if isinstance(layer, SyncBatchNorm):
                self._ends.append(layer.look(self._looker(name, layer)))
            else:
                self._ends.append(layer.register_forward_hook(self._hook(name)).remove)

    def read(self) -> dict[str, Percentiles]:
        """Of every layer that has seen an image. Waits for the device."""
        found = {}
        for name, sample_SC in self._samples.items():
            if len(sample_SC):
                values_SC = sample_SC.float().cpu().numpy()
                unit = values_SC.shape[1] // 2
                number = unit * self._units.get(name, 1)
                found[name] = Percentiles(number, _percentiles(values_SC[:, unit]), _percentiles(values_SC))
        return found

    def close(self) -> None:
        """Watch no longer."""
        for end in self._ends:
            end()
        self._ends.clear()

    def _looker(self, name: str, norm: SyncBatchNorm) -> Callable[[Tensor, Statistics], None]:
        def look(x: Tensor, known: Statistics) -> None:
            self._samples[name] = normalization.normalized(_sample(x), known, norm.bias, None)

        def look_at_some(x_NF: Tensor, known: Statistics) -> None:
            # An activation has one value an image: all images of some, rather than some images of all.
            step = -(-x_NF.numel() // VALUES) | 1
            thin = slice(None, None, step)
            of_thin = Statistics(known.mean_C[thin], known.scale_C[thin], known.invstd_C[thin], known.total)
            bias = None if norm.bias is None else norm.bias[thin]
            self._samples[name] = normalization.normalized(x_NF.detach()[:, thin], of_thin, bias, None)
            self._units[name] = step

        return look_at_some if isinstance(norm, PerActivationNorm) else look

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def look(layer: nn.Module, _: Any, x: Tensor) -> None:
            if layer.training:
                with torch.no_grad():
                    self._samples[name] = _sample(x)

        return look


def _sample(x: Tensor) -> Tensor:
    """A copy (S, C) of x (N, C, *), with C x S at most VALUES where C allows it, evenly spread."""
    rows_SC = x.detach().movedim(1, -1).reshape(-1, x.shape[1])
    stride = -(-rows_SC.numel() // VALUES) if rows_SC.numel() else 1
    # An odd stride: an even one would see single columns of the images, whose sides are powers of two or close.
    return rows_SC[:: stride | 1].clone()


def _percentiles(values: Any) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, PERCENTS)
    return float(low), float(middle), float(high)
