"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), the same for any split of a batch over ranks.

Neighbours in the global batch are partners, places 0 and 1, 2 and 3 and so on: their order is a permutation already, so
these pairs are drawn at random, and a share, which is a run of places, lacks at most one partner at either end. Those
two the rank decodes as well. Each image has a share and a box of its own, keyed by (seed, epoch, sample).
Legend: N images, R rows: the N images and partners that other ranks hold; C colours, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.keyed_random import mixed, uniforms

_MIX = 3  # what an image's key is for; augment.py has 1 and 2, policy.py 4


class Mix(NamedTuple):
    """How an image is mixed. share: of its own label. Box, in pixels: where the partner's pixels stand, if it is any.

    Without a box all pixels are share x own + (1 - share) x partner's.
    """

    share: float = 1.0
    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


UNMIXED = Mix()


@dataclass(frozen=True, slots=True)
class Mixing:
    """mixup, cutmix: of each the alpha of its Beta(alpha, alpha); 0 = never. Of both an image takes one at random."""

    mixup: float = 0.0
    cutmix: float = 0.0

    def draw(self, key: int, size: int) -> Mix:
        """How the image with this key, of size x size pixels, is mixed."""
        draw = uniforms(mixed(key, _MIX))
        chance = next(draw)
        cut = self.cutmix > 0 and (not self.mixup or chance < 0.5)
        share = beta(self.cutmix if cut else self.mixup, draw)
        if not cut:
            return Mix(share)
        half = size * math.sqrt(1 - share) / 2
        x, y = size * next(draw), size * next(draw)
        left, right = (min(max(round(x + side), 0), size) for side in (-half, half))
        top, bottom = (min(max(round(y + side), 0), size) for side in (-half, half))
        area = (right - left) * (bottom - top)
        return Mix(1 - area / size**2, left, top, right, bottom) if area else UNMIXED


def partner(place: int, batch_size: int) -> int:
    """Where in the global batch the image at `place` finds what it is mixed with; the odd one out, at its neighbour."""
    other = place ^ 1
    return other if other < batch_size else max(place - 1, 0)


def beta(alpha: float, draw: Iterator[float]) -> float:
    """A number in 0..1 with the density of Beta(alpha, alpha), by Joehnk's rejection (1964): good for alpha up to 2."""
    while True:
        x, y = (math.log1p(-next(draw)) / alpha for _ in range(2))
        most = max(x, y)
        if most + math.log(math.exp(x - most) + math.exp(y - most)) <= 0:
            return 1 / (1 + math.exp(min(y - x, 700.0)))


def blended(image_RCHW: Tensor, partner_N2: Tensor, mix_N5: Tensor) -> Tensor:
    """Prepared images, each mixed with its partner (N, C, H, W). Elementwise: an image's bits do not depend on others.

    partner_N2: rows further on where the partner is, and its label. mix_N5: a Mix for each.
    """
    n = len(partner_N2)
    own_NCHW = image_RCHW[:n]
    row_N = torch.arange(n, device=image_RCHW.device) + partner_N2[:, 0]
    other_NCHW = image_RCHW[row_N]
    share_N111, left, top, right, bottom = (value.view(-1, 1, 1, 1) for value in mix_N5.unbind(1))
    x_W = torch.arange(image_RCHW.shape[3], device=image_RCHW.device)
    y_H1 = torch.arange(image_RCHW.shape[2], device=image_RCHW.device)[:, None]
    inside_N1HW = (x_W >= left) & (x_W < right) & (y_H1 >= top) & (y_H1 < bottom)
    weight_N111 = torch.where(right > left, 1.0, share_N111).to(own_NCHW.dtype)
    # Two products and a sum, rounded one by one: a fused form rounds otherwise at the end of a row than within it.
    mixed_NCHW = own_NCHW * weight_N111 + other_NCHW * (1 - weight_N111)
    return torch.where(inside_N1HW, other_NCHW, mixed_NCHW)
