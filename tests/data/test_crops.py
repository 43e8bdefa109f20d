"""Views against a reference that shares no code with them: Pillow alone, one image and one view at a time."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from pipeline.data.augment import UNCHANGED, CentreCrop
from pipeline.data.crops import Views
from pipeline.data.decode import DecodeError
from tests.conftest import noise_image

SHAPES = {
    "portrait": (150, 260), "landscape": (301, 199), "square": (240, 240), "tiny": (7, 5), "one pixel": (1, 1),
    "thin": (400, 31), "tall": (33, 190), "just as large": (256, 256), "large": (500, 375),
}  # fmt: skip


def nearest(value: Fraction) -> int:
    """Halves up."""
    return int((value + Fraction(1, 2)) // 1)


def reference(payload: bytes, size: int, count: int) -> list[np.ndarray]:
    """GoogLeNet's views, written down once more."""
    image = Image.open(io.BytesIO(payload))
    image = image.convert("RGB") if image.mode != "RGBA" else over_white(image)
    views = []
    for scale in (Fraction(8, 7), Fraction(9, 7), Fraction(10, 7), Fraction(11, 7)):
        side = nearest(scale * size)
        factor = Fraction(side, min(image.size))
        whole = image.resize((nearest(factor * image.width), nearest(factor * image.height)), Image.Resampling.BILINEAR)
        for third in range(3):
            left = {0: 0, 1: (whole.width - side) // 2, 2: whole.width - side}[third]
            top = {0: 0, 1: (whole.height - side) // 2, 2: whole.height - side}[third]
            square = whole.crop((left, top, left + side, top + side))
            far, middle = side - size, (side - size) // 2
            crops = [square.crop((x, y, x + size, y + size))
                     for x, y in ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))]  # fmt: skip
            if count == 144:
                crops.append(square.resize((size, size), Image.Resampling.BILINEAR))
            elif scale != Fraction(8, 7) or third != 1:
                continue
            views += crops
    mirrored = [view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for view in views]
    return [np.asarray(view) for view in [*views, *mirrored]]


def over_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pixels(payload: bytes, size: int, count: int) -> list[np.ndarray]:
    """Our views, mirrored as the device does it."""
    views = Views(count, CentreCrop(size))
    return [
        view[:, ::-1] if variation.flip else view
        for view, variation in zip(views.of(payload), views.variations, strict=True)
    ]


@pytest.mark.parametrize("count", [10, 144])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_views_equal_a_reference_to_the_pixel(name, kind, count):
    payload = noise_image(3, *SHAPES[name], kind)
    size = 224 if name == "large" else 56
    ours, theirs = pixels(payload, size, count), reference(payload, size, count)
    assert len(ours) == len(theirs) == count
    for view, expected in zip(ours, theirs, strict=True):
        assert view.shape == (size, size, 3)
        assert np.array_equal(view, expected)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "L"), ("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "CMYK")]
)
def test_other_kinds_of_pixels_have_the_same_views(kind, mode):
    payload = noise_image(4, 90, 61, kind, mode)
    for view, expected in zip(pixels(payload, 32, 144), reference(payload, 32, 144), strict=True):
        assert np.array_equal(view, expected)


def test_a_square_image_has_144_views_of_which_two_thirds_repeat_others():
    views = pixels(noise_image(1, 80, 80), 56, 144)
    assert len(views) == 144
    assert len({view.tobytes() for view in views}) == 48
    assert len({view.tobytes() for view in pixels(noise_image(1, 80, 61), 56, 144)}) == 144


def test_ten_views_are_among_the_144():
    payload = noise_image(2, 90, 70)
    many = {view.tobytes() for view in pixels(payload, 56, 144)}
    assert {view.tobytes() for view in pixels(payload, 56, 10)} <= many


def test_one_view_is_that_of_validation_in_training():
    crop = CentreCrop(32)
    payload = noise_image(5, 70, 50, "JPEG")
    (view,) = Views(1, crop).of(payload)
    assert np.array_equal(view, crop.crop(payload))
    assert Views(1, crop).variations == [UNCHANGED]


@pytest.mark.parametrize("size", [28, 32, 224, 299])
def test_scales_are_in_proportion_to_the_crop(size):
    """The whole first square is seen by the corners of the first scale: they overlap by what proportion says."""
    side = nearest(Fraction(8 * size, 7))
    ramp = np.arange(side, dtype=np.uint8)[None, :, None].repeat(side, 0).repeat(3, 2)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    views = Views(10, CentreCrop(size)).of(buffer.getvalue())
    assert views[0][0, 0, 0] == 0
    assert views[1][0, -1, 0] == (side - 1) % 256  # nothing was resized: the image has that side
    assert views[4][0, 0, 0] == (side - size) // 2


def test_an_image_that_would_become_too_large_is_a_bad_one():
    buffer = io.BytesIO()
    Image.new("L", (60_000, 1)).save(buffer, "PNG")
    with pytest.raises(DecodeError, match="60000 x 1 pixels, 256 on the shorter side, would be 15360000 x 256"):
        Views(10, CentreCrop(224)).of(buffer.getvalue())
