"""Batches: how a global batch is cut over ranks, and how decoded images become tensors.

A global batch is a run of places in the order. It is cut into micro-batches, each into contiguous
shares that differ by at most one image, for any number of ranks; a share may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import UNCHANGED, Variation
from pipeline.data.decode import Pixels
from pipeline.data.keyed_random import signed
from pipeline.data.mixing import UNMIXED, Mix


class Batch(NamedTuple):
    """One rank's images of a (micro-)batch."""

    image_NCHW: Tensor  # uint8, channels last in memory; where images are mixed, partners that others hold follow
    label_N: Tensor  # int64
    key_N: Tensor  # int64, hash of (seed, epoch, sample): keys the dropout
    variation_NV: Tensor  # float64, for augment.Preparation: flip, brightness, contrast, saturation; of partners, too
    weight_N: Tensor  # float32, 1 for an image, 0 for padding
    sample_N: Tensor  # int64, number of the sample in its split
    partner_N2: Tensor  # int64, rows further on where its partner is, 0 = none, and the partner's label
    mix_N5: Tensor  # float64, a mixing.Mix


def share(total: int, parts: int, part: int) -> range:
    """The part-th of `parts` contiguous pieces of range(total); sizes differ by at most one, larger ones first."""
    base, extra = divmod(total, parts)
    first = part * base + min(part, extra)
    return range(first, first + base + (part < extra))


def micro_batches(global_batch_size: int, world: int, micro_batch_size: int) -> int:
    """How many pieces a global batch is cut into so that no rank holds more than micro_batch_size images; 0 = one."""
    if not micro_batch_size:
        return 1
    return -(-global_batch_size // (world * micro_batch_size))


def rank_places(global_batch_size: int, pieces: int, piece: int, world: int, rank: int) -> range:
    """Places within a global batch that one rank holds of one micro-batch."""
    micro = share(global_batch_size, pieces, piece)
    mine = share(len(micro), world, rank)
    return range(micro.start + mine.start, micro.start + mine.stop)


def collate(
    images: Sequence[Pixels],
    labels: Sequence[int],
    keys: Sequence[int],
    variations: Sequence[Variation],
    samples: Sequence[int],
    size: int,
    padded_to: int = 0,
    partners: Sequence[tuple[int, int]] = (),
    mixes: Sequence[Mix] = (),
) -> Batch:
    """A Batch of images (size, size, 3), filled up with black images of weight 0 to padded_to.

    partners, mixes: of each label's image; then images and variations may be more, of partners that others hold.
    """
    real, total = len(labels), max(len(labels), padded_to)
    rows = max(len(images), total)
    pixels_NHWC = np.empty((rows, size, size, 3), dtype=np.uint8)
    pixels_NHWC[len(images) :] = 0
    for row, image in enumerate(images):
        pixels_NHWC[row] = image
    padding = [0] * (total - real)
    weight_N = torch.zeros(total)
    weight_N[:real] = 1
    return Batch(
        torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2),
        torch.tensor([*labels, *padding], dtype=torch.int64),
        torch.tensor([*map(signed, keys), *padding], dtype=torch.int64),
        torch.tensor([*variations, *[UNCHANGED] * len(padding)], dtype=torch.float64).view(rows, len(UNCHANGED)),
        weight_N,
        torch.tensor([*samples, *padding], dtype=torch.int64),
        torch.tensor([*partners], dtype=torch.int64).view(-1, 2) if partners else torch.zeros(total, 2).long(),
        torch.tensor([*mixes] or [UNMIXED] * total, dtype=torch.float64).view(total, len(UNMIXED)),
    )
