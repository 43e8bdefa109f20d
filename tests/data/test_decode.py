import contextlib
import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import decode as module
from pipeline.data.augment import resized
from pipeline.data.decode import DecodeError, decode, decode_region, image_type
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


def test_the_extension_is_built_where_it_can_be():
    """A fallback that nobody notices would make every figure of speed untrue: where it is expected it must be there."""
    if module.jpeg_region is None and not os.environ.get("PIPELINE_EXPECTS_EXTENSION"):
        pytest.skip("not built: install gcc, python3-dev and libjpeg62-turbo-dev, then make clean")
    assert module.jpeg_region is not None


def photograph(seed: int, width: int, height: int, subsampling: str, progressive: bool, gray: bool) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (max(1, height // 3), max(1, width // 3), 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height))
    buffer = io.BytesIO()
    image.convert("L" if gray else "RGB").save(
        buffer, "JPEG", quality=80, subsampling=subsampling, progressive=progressive
    )
    return buffer.getvalue()


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 99), width=st.integers(1, 180), height=st.integers(1, 150), data=st.data(),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]), progressive=st.booleans(), gray=st.booleans(),
)  # fmt: skip
def test_a_region_is_bit_for_bit_the_whole_image_decoded_and_cropped(
    seed, width, height, subsampling, progressive, gray, data
):
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
    payload = photograph(seed, width, height, subsampling, progressive, gray)
    whole = decode(payload)
    region = decode_region(payload, lambda *shape: box, size=200)  # larger than any box: full scale
    assert np.array_equal(region, whole[box[1] : box[3], box[0] : box[2]])


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 99), width=st.integers(64, 300), height=st.integers(64, 300), data=st.data(),
       subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))  # fmt: skip
def test_the_extension_changes_time_and_no_bit(seed, width, height, subsampling, data):
    left, top = data.draw(st.integers(0, width - 33)), data.draw(st.integers(0, height - 33))
    box = (left, top, data.draw(st.integers(left + 32, width)), data.draw(st.integers(top + 32, height)))
    payload = photograph(seed, width, height, subsampling, False, False)
    for size in (4, 8, 16, 32):  # scales 1/8, 1/4, 1/2 and 1, as the box allows
        with pytest.MonkeyPatch.context() as patch:
            with_extension = decode_region(payload, lambda *shape: box, size)
            patch.setattr(module, "jpeg_region", None)
            assert np.array_equal(decode_region(payload, lambda *shape: box, size), with_extension)


def test_a_scaled_region_is_near_the_whole_image_decoded_cropped_and_resized():
    """The tolerance: DCT scaling is another low-pass filter. On ImageNet's photographs see benchmarks.md."""
    payload = noise_image(5, 640, 480, "JPEG")
    box = (101, 53, 600, 467)
    scaled = decode_region(payload, lambda *shape: box, size=100)
    assert scaled.shape == (104, 125, 3)  # 1/4
    exact = resized(decode(payload)[box[1] : box[3], box[0] : box[2]], 100).astype(int)
    difference = np.abs(resized(scaled, 100).astype(int) - exact)
    assert difference.mean() < 1
    assert difference.max() <= 8


def test_a_legal_sampling_that_the_decoder_does_not_know_is_pillows_to_judge():
    payload = bytearray(photograph(1, 64, 64, "4:2:0", False, False))
    place = payload.index(b"\xff\xc0") + 11  # the sampling factors of the first component
    assert payload[place] == 0x22
    payload[place] = 0x14
    with contextlib.suppress(DecodeError):
        assert decode(bytes(payload)).shape == (64, 64, 3)


def test_a_run_may_be_held_to_decode_the_whole_image():
    payload = photograph(1, 200, 160, "4:2:0", False, False)
    calls = []
    if module.jpeg_region is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(1) or np.zeros((160, 200, 3)))
            decode_region(payload, lambda *shape: (0, 0, 40, 8), 8, module.REGIONS)
            assert calls == []
            decode_region(payload, lambda *shape: (0, 0, 40, 8), 8, module.WHOLE)
            assert calls == [1]


def test_a_cut_image_is_damaged_wherever_the_region_lies():
    payload = photograph(1, 200, 160, "4:2:0", False, False)
    with pytest.raises(DecodeError, match="truncated"):
        decode_region(payload[: len(payload) * 3 // 4], lambda *shape: (0, 0, 40, 8), 8)


def test_a_region_of_any_other_kind_is_cut_from_the_whole():
    for kind, mode in (("PNG", "RGB"), ("WEBP", "RGB"), ("JPEG", "CMYK")):
        payload = noise_image(1, 40, 30, kind, mode)
        assert np.array_equal(decode_region(payload, lambda *shape: (5, 3, 20, 9), 99), decode(payload)[3:9, 5:20])


def test_the_extension_refuses_a_region_outside_the_image():
    if module.jpeg_region is None:
        pytest.skip("not built")
    payload = noise_image(0, 40, 30, "JPEG")
    for box in ((0, 0, 41, 30), (0, 0, 40, 31), (-1, 0, 4, 4), (5, 5, 5, 9)):
        with pytest.raises(ValueError, match="lies outside the 40 x 30 pixels"):
            module.jpeg_region.decode(payload, *box, 1)
    for damaged in (b"", payload[:100], b"x" * 50):
        with pytest.raises(ValueError):  # noqa: PT011
            module.jpeg_region.decode(damaged, 0, 0, 4, 4, 1)
