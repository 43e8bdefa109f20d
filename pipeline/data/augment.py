"""Pixels as a function of (image, key): random resized crop, flip, photometric distortion; and the evaluation crop.

The key is a hash of (seed, epoch, sample), so pixels do not depend on rank, worker or batch.
Crop: area uniform in [area_min, 1], aspect log-uniform in [3/4, 4/3] (Szegedy et al. 2015). Distortion:
brightness, contrast and saturation each in 1 +- strength (Howard 2013); BN-x* reduce it (paper, 4.2.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.decode import Pixels
from pipeline.data.keyed_random import uniforms

PHOTOMETRIC = {"full": 0.5, "reduced": 0.25, "none": 0.0}  # the paper gives no extent for "reduced": half is ours
_LUMA = np.array([0.299, 0.587, 0.114])
_MIRRORED = Image.Transpose.FLIP_LEFT_RIGHT


@dataclass(frozen=True, slots=True)
class Augmentation:
    """size: pixels a side of the output. area_min: smallest crop, fraction of the image; 1 = the whole image."""

    size: int
    area_min: float = 0.08
    flip: bool = True
    photometric: str = "full"

    def __call__(self, image: Pixels, key: int) -> Pixels:
        """Training pixels (size, size, 3) of one image (H, W, 3) for one key."""
        draw = uniforms(key)
        height, width = image.shape[:2]
        box = _crop_box(width, height, self.area_min, draw)
        output = _resized(image, box, self.size)
        if next(draw) < 0.5 and self.flip:
            output = output.transpose(_MIRRORED)
        strength = PHOTOMETRIC[self.photometric]
        if strength:
            factors = [1 + strength * (2 * next(draw) - 1) for _ in range(3)]
            output = _distorted(output, *factors)
        return np.asarray(output)


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """The evaluation view: the central square, `fraction` of the shorter side, resized to size pixels a side."""

    size: int
    fraction: float = 0.875

    def __call__(self, image: Pixels) -> Pixels:
        height, width = image.shape[:2]
        side = min(height, width) * self.fraction
        left, top = (width - side) / 2, (height - side) / 2
        return np.asarray(_resized(image, (left, top, left + side, top + side), self.size))


Box = tuple[float, float, float, float]


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


def _resized(image: Pixels, box: Box, size: int) -> Image.Image:
    # Bilinear with the support widened on shrinking, so that fine texture does not alias.
    return Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)


def _distorted(image: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    """All three as one affine map of colours, applied in one pass in C and clipped once to 0..255."""
    mean = float(np.asarray(image).mean((0, 1)) @ _LUMA) * brightness
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _LUMA)
    offset = np.full((3, 1), (1 - contrast) * mean)
    return image.convert("RGB", tuple(np.hstack([matrix, offset]).ravel().tolist()))
