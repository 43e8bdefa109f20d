"""RandAugment (Cubuk et al. 2020): a few operations on a crop, drawn and measured by its key.

Operations and their extent are those of torchvision's RandAugment at a scale of 0 to 10, by Pillow: integers whose bits
depend on no thread, and no import of torchvision in a process that loads (2.7 s). What comes from outside the image is
grey. Two operations on 224 x 224 pixels take 0.43 ms of a core beside 1.2 ms of decoding and cropping a photograph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from pipeline.data.decode import Pixels
from pipeline.data.keyed_random import mixed, uniforms

MOST = 10.0  # the strongest magnitude
_POLICY = 4  # what an image's key is for; augment.py has 1 and 2, mixing.py 3
_GREY = (128, 128, 128)
_TRANSLATION = 150 / 331  # of a side, at most

Operation = Callable[[Image.Image, float], Image.Image]  # of an image and a strength, -1 to 1 or, unsigned, 0 to 1


@dataclass(frozen=True, slots=True)
class Policy:
    """operations: an image. magnitude: 0 to 10. spread: standard deviation of each operation's own around it."""

    operations: int
    magnitude: float
    spread: float = 0.0

    def applied(self, pixels_HWC: Pixels, key: int) -> Pixels:
        """The crop behind its operations, as uint8."""
        draw = uniforms(mixed(key, _POLICY))
        image = Image.fromarray(pixels_HWC)
        for _ in range(self.operations):
            operation, signed = OPERATIONS[int(next(draw) * len(OPERATIONS))]
            strength = min(max(self.magnitude + self.spread * _normal(draw), 0.0), MOST) / MOST
            sign = -1.0 if next(draw) < 0.5 and signed else 1.0
            image = operation(image, sign * strength)
        return np.asarray(image)


def _normal(draw: Iterator[float]) -> float:
    """A standard normal number (Box & Muller 1958)."""
    radius = math.sqrt(-2 * math.log1p(-next(draw)))
    return radius * math.cos(2 * math.pi * next(draw))


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """matrix: of the output's pixels into the input's, six numbers by rows."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=_GREY)


def _shear_x(image: Image.Image, strength: float) -> Image.Image:
    shear = 0.3 * strength
    return _affine(image, 1, shear, -shear * image.height / 2, 0, 1, 0)


def _shear_y(image: Image.Image, strength: float) -> Image.Image:
    shear = 0.3 * strength
    return _affine(image, 1, 0, 0, shear, 1, -shear * image.width / 2)


def _translate_x(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, 1, 0, -int(strength * _TRANSLATION * image.width), 0, 1, 0)


def _translate_y(image: Image.Image, strength: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, -int(strength * _TRANSLATION * image.height))


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(30 * strength, Image.Resampling.NEAREST, fillcolor=_GREY)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


OPERATIONS: tuple[tuple[Operation, bool], ...] = (  # and whether half of all strengths are negative
    (lambda image, strength: image, False),
    (_shear_x, True),
    (_shear_y, True),
    (_translate_x, True),
    (_translate_y, True),
    (_rotate, True),
    (_enhanced(ImageEnhance.Brightness), True),
    (_enhanced(ImageEnhance.Color), True),
    (_enhanced(ImageEnhance.Contrast), True),
    (_enhanced(ImageEnhance.Sharpness), True),
    (lambda image, strength: ImageOps.posterize(image, 8 - round(4 * strength)), False),
    (lambda image, strength: ImageOps.solarize(image, round(255 * (1 - strength))), False),
    (lambda image, strength: ImageOps.autocontrast(image), False),
    (lambda image, strength: ImageOps.equalize(image), False),
)
