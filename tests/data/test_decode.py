import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import DecodeError, decode, image_type
from tests.conftest import noise_image


def reference(payload: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")]
)
def test_every_kind_of_image_becomes_rgb(kind, mode):
    payload = noise_image(1, 40, 30, kind, mode)
    pixels = decode(payload)
    assert (pixels.shape, pixels.dtype) == ((30, 40, 3), np.uint8)
    assert np.abs(pixels.astype(int) - reference(payload)).max() <= 3  # two IDCTs and two chroma upsamplings


def test_bytes_decide_and_not_the_name():
    # ImageNet has a PNG called .JPEG, and JPEGs in CMYK.
    assert image_type(noise_image(0, 8, 8, "PNG")) == "png"
    assert image_type(noise_image(0, 8, 8, "JPEG", "CMYK")) == "jpg"
    assert image_type(noise_image(0, 8, 8, "WEBP")) == "webp"
    assert image_type(b"plain text") is None


def test_transparency_is_laid_on_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert (decode(buffer.getvalue()) == 255).all()


def test_palettes_and_sixteen_bits_decode():
    for mode in ("P", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (3, 2)).save(buffer, "PNG")
        assert decode(buffer.getvalue()).shape == (2, 3, 3)


@pytest.mark.parametrize("payload", [b"", b"not an image", b"\xff\xd8\xff\xe0 garbage", noise_image(0, 64, 64)[:200]])
def test_damaged_bytes_are_refused(payload):
    with pytest.raises(DecodeError):
        decode(payload)
