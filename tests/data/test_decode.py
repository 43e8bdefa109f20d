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


def test_palettes_decode():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 200, 77)).convert("P").save(buffer, "PNG")
    assert decode(buffer.getvalue()).shape == (2, 3, 3)


def test_sixteen_bits_are_scaled_and_not_clipped():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(buffer, "PNG")
    assert decode(buffer.getvalue())[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_small_file_may_not_unpack_to_gigabytes(monkeypatch):
    payload = noise_image(0, 60, 60, "JPEG")
    monkeypatch.setattr("pipeline.data.decode.MAX_PIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DecodeError, match="exceeds limit"):
        decode(payload)


@pytest.mark.parametrize("payload", [b"", b"not an image", b"\xff\xd8\xff\xe0 garbage", noise_image(0, 64, 64)[:200]])
def test_damaged_bytes_are_refused(payload):
    with pytest.raises(DecodeError):
        decode(payload)
