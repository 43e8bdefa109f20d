"""Several views of an image for evaluation, as GoogLeNet's procedure takes them (Szegedy et al. 2015, section 7).

For crops of 224 pixels the image is resized, its aspect kept, so that its shorter side is 256, 288, 320 and 352. Of
each, the left, central and right square (of a tall image the upper, central and lower one); of each square the four
corners, the centre, and all of it resized; and all these mirrored: 4 x 3 x 6 x 2 = 144. Of a square image the three
squares are the same, and stay three. The 10 views are the first scale's corners and centre of the central square
(Krizhevsky et al. 2012), so ten of the 144. Other sizes have their scales in proportion: 8, 9, 10 and 11 sevenths.

Exactly: a side of s S / 7 pixels and the longer side in proportion are rounded to the nearest, halves up; what is left
over beside a centre is rounded down; resizing is Pillow's bilinear filter, antialiased, in its whole numbers, so that a
view is the same to the pixel on any machine. All of the image is decoded: benchmarks.md says what that costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.augment import UNCHANGED, CentreCrop, Variation
from pipeline.data.decode import MAX_PIXELS, DecodeError, Pixels, decode

VIEWS = (1, 10, 144)
_SCALES = (8, 9, 10, 11)  # sevenths of a crop's side
_MIRRORED = UNCHANGED._replace(flip=1.0)


@dataclass(frozen=True, slots=True)
class Views:
    """The views of an image: 1 (what validation in training sees), 10 or 144. single: the one view."""

    count: int
    single: CentreCrop

    @property
    def size(self) -> int:
        return self.single.size

    @property
    def variations(self) -> list[Variation]:
        """What happens to each on the device: the second half are the first, mirrored."""
        half = self.count // 2
        return [UNCHANGED] * (self.count - half) + [_MIRRORED] * half

    def of(self, payload: bytes) -> list[Pixels]:
        """Each view (size, size, 3) of an image's bytes, not yet mirrored. Raises DecodeError."""
        if self.count == 1:
            return [self.single.crop(payload)]
        views = _ten if self.count == 10 else _many
        return list(views(decode(payload), self.size)) * 2


def _ten(pixels_HWC: Pixels, size: int) -> Iterator[Pixels]:
    """Corners and centre of the central square."""
    _, square, _ = _squares(pixels_HWC, _side(size, _SCALES[0]))
    return _corners_and_centre(square, size)


def _many(pixels_HWC: Pixels, size: int) -> Iterator[Pixels]:
    for scale in _SCALES:
        for square in _squares(pixels_HWC, _side(size, scale)):
            yield from _corners_and_centre(square, size)
            yield _resized(square, size, size)


def _side(size: int, scale: int) -> int:
    return (2 * size * scale + 7) // 14


def _squares(pixels_HWC: Pixels, side: int) -> list[Pixels]:
    """The first, central and last square of the image, resized so that its shorter side is `side`."""
    height, width = pixels_HWC.shape[:2]
    shorter = min(height, width)
    tall, wide = ((2 * each * side + shorter) // (2 * shorter) for each in (height, width))
    if tall * wide > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels, {side} on the shorter side, would be {wide} x {tall}: too many")
    whole = _resized(pixels_HWC, wide, tall)
    rest = max(tall, wide) - side
    if tall > wide:
        return [whole[first : first + side] for first in (0, rest // 2, rest)]
    return [whole[:, first : first + side] for first in (0, rest // 2, rest)]


def _corners_and_centre(square: Pixels, size: int) -> Iterator[Pixels]:
    rest = len(square) - size
    for top, left in ((0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2)):
        yield square[top : top + size, left : left + size]


def _resized(pixels_HWC: Pixels, width: int, height: int) -> Pixels:
    """By Pillow, not by augment.resized, which is four times as fast and within two levels of it."""
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
