"""Pixels as a function of (image, key): random resized crop, flip, photometric distortion; and the evaluation crop.

The key is a hash of (seed, epoch, sample), so pixels do not depend on rank, worker or batch. The crop is
taken where the image is decoded; flip, distortion and normalization follow on the device, whole batches
at a time, from numbers that the key gave.
Crop: area uniform in [area_min, 1], aspect log-uniform in [3/4, 4/3] (Szegedy et al. 2015). Distortion:
brightness, contrast and saturation each in 1 +- strength (Howard 2013); BN-x* reduce it (paper, 4.2.1).
Legend: N images, C colours, H, W pixels, V the four numbers of a variation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.data.decode import Box, Pixels, decode_region
from pipeline.data.keyed_random import mixed, uniforms
from pipeline.data.mixing import Mixing
from pipeline.data.policy import Policy

PHOTOMETRIC = {"full": 0.5, "reduced": 0.25, "none": 0.0}  # the paper gives no extent for "reduced": half is ours
_CROP, _VARIATION = 1, 2  # what an image's key is for; mixing.py has 3, policy.py 4


class Variation(NamedTuple):
    """What happens to an image on the device. flip: 0 or 1; the others are factors."""

    flip: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


UNCHANGED = Variation()


@dataclass(frozen=True, slots=True)
class Growth:
    """Images that grow with the epochs: from `first`, a fraction of the full side, in so many steps, whole in `epochs`.

    Progressive resizing (Howard 2018), as FFCV's recipes do it: an epoch has one size.
    """

    first: float
    steps: int
    epochs: float

    def size(self, epoch: int, full: int) -> int:
        """Pixels a side in an epoch, counted from 0."""
        done = min(int(epoch / self.epochs * self.steps), self.steps) / self.steps
        return max(round(full * (self.first + (1 - self.first) * done)), 1)

    def sizes(self, full: int) -> list[int]:
        """All that there are, in their order."""
        return sorted({self.size(epoch, full) for epoch in range(math.ceil(self.epochs) + 1)})


@dataclass(frozen=True, slots=True)
class Augmentation:
    """size: pixels a side of the output. area_min: smallest crop, fraction of the image; 1 = the whole image."""

    size: int
    area_min: float = 0.08
    flip: bool = True
    photometric: str = "full"
    decoder: str = ""  # see decode.decode_region
    policy: Policy | None = None
    mixing: Mixing | None = None
    growth: Growth | None = None

    def at(self, epoch: int) -> Augmentation:
        """What it is in an epoch; below 0, of images to estimate statistics of: of full size, by no policy, unmixed."""
        if epoch < 0:
            return replace(self, policy=None, mixing=None, growth=None)
        return self if self.growth is None else replace(self, size=self.growth.size(epoch, self.size), growth=None)

    def crop(self, payload: bytes, key: int) -> Pixels:
        """The training crop (size, size, 3) of an image's bytes. Raises DecodeError."""
        pixels = resized(decode_region(payload, partial(self.box, key=key), self.size, self.decoder), self.size)
        return pixels if self.policy is None else self.policy.applied(pixels, key)

    def box(self, width: int, height: int, key: int) -> Box:
        """Which part of an image the crop shows."""
        return _crop_box(width, height, self.area_min, uniforms(mixed(key, _CROP)))

    def variation(self, key: int) -> Variation:
        draw = uniforms(mixed(key, _VARIATION))
        flip = float(next(draw) < 0.5 and self.flip)
        strength = PHOTOMETRIC[self.photometric]
        return Variation(flip, *(1 + strength * (2 * next(draw) - 1) for _ in range(3)))


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """The evaluation view: the central square, `fraction` of the shorter side, resized to size pixels a side."""

    size: int
    fraction: float = 0.875
    decoder: str = ""

    def crop(self, payload: bytes) -> Pixels:
        """The view (size, size, 3) of an image's bytes. Raises DecodeError."""
        return resized(decode_region(payload, self._box, self.size, self.decoder), self.size)

    def _box(self, width: int, height: int) -> Box:
        side = max(1, round(min(height, width) * self.fraction))
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side


class Preparation(nn.Module):
    """A batch of crops as the network's input: flipped, distorted, normalized.

    mean, std: of pixels in 0..1, per colour.
    Each image's result depends on that image alone, whatever batch it is in: sums over pixels are
    of whole numbers, all else is elementwise.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, values in (("mean_C11", mean), ("std_C11", std), ("luma_C11", (0.299, 0.587, 0.114))):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64).view(3, 1, 1), persistent=False)
        self.mean_C11: Tensor
        self.std_C11: Tensor
        self.luma_C11: Tensor

    def forward(self, image_NCHW: Tensor, variation_NV: Tensor, dtype: torch.dtype) -> Tensor:
        """Uint8 images and the variation of each -> images of dtype."""
        flip_N, brightness_N, contrast_N, saturation_N = variation_NV.unbind(1)
        flip_N111 = flip_N.bool().view(-1, 1, 1, 1)
        image_NCHW = torch.where(flip_N111, image_NCHW.flip(3), image_NCHW)
        luma_N = (image_NCHW.sum((2, 3), dtype=torch.int64) * self.luma_C11.flatten()).sum(1)
        mean_N = luma_N / (image_NCHW.shape[2] * image_NCHW.shape[3]) * brightness_N
        # One affine map of colours for all three, clipped once: p -> bc (s p + (1 - s) luma(p)) + (1 - c) b mean.
        own_N111, grey_N111, offset_N111 = (
            value_N.to(dtype).view(-1, 1, 1, 1)
            for value_N in (
                brightness_N * contrast_N * saturation_N,
                brightness_N * contrast_N * (1 - saturation_N),
                (1 - contrast_N) * mean_N,
            )
        )
        pixel_NCHW = image_NCHW.to(dtype)
        luma_N1HW = (pixel_NCHW * self.luma_C11.to(dtype)).sum(1, keepdim=True)
        varied_NCHW = torch.addcmul(luma_N1HW * grey_N111 + offset_N111, pixel_NCHW, own_N111).clamp_(0, 255)
        scale_C11, shift_C11 = 1 / (255 * self.std_C11), self.mean_C11 / self.std_C11
        return varied_NCHW * scale_C11.to(dtype) - shift_C11.to(dtype)


def resized(pixels_HWC: Pixels, size: int) -> Pixels:
    """The image as (size, size, 3). Bilinear, with the support widened on shrinking so that texture does not alias.

    Torch's kernel for uint8: within two levels of Pillow's and four times as fast (152 against 609 us for ImageNet's
    crops; OpenCV's area resize takes 404).
    """
    # The batch axis first: added after the permutation its stride is not that of channels last, torch answers in
    # planes, and turning those costs 60 us here and 160 where the batch is filled.
    image_NCHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    output = nn.functional.interpolate(image_NCHW, (size, size), mode="bilinear", antialias=True)
    view: Pixels = output[0].permute(1, 2, 0).numpy()
    return view


def _crop_box(width: int, height: int, area_min: float, draw: Iterator[float]) -> Box:
    """A random rectangle inside the image; after ten that do not fit, the central square."""
    if area_min >= 1:
        return 0, 0, width, height
    for _ in range(10):
        area = width * height * (area_min + (1 - area_min) * next(draw))
        aspect = math.exp(math.log(4 / 3) * (2 * next(draw) - 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(next(draw) * (width - w + 1)), int(next(draw) * (height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
