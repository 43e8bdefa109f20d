import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from pipeline.data import augment as module
from pipeline.data.augment import UNCHANGED, Augmentation, CentreCrop, Preparation, Variation, resized
from pipeline.data.decode import decode
from pipeline.data.keyed_random import mixed
from tests.conftest import noise_image

PLAIN = Preparation((0, 0, 0), (1, 1, 1))  # pixels in 0..1


@pytest.fixture
def payload() -> bytes:
    return noise_image(3, 50, 40)


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def on_device(pixels_HWC: np.ndarray, variation: Variation) -> np.ndarray:
    """What the network would see of one image, as pixels in 0..255."""
    image_NCHW = torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1)[None]
    prepared = PLAIN(image_NCHW, torch.tensor([variation], dtype=torch.float64), torch.float64)
    return (prepared[0].permute(1, 2, 0) * 255).numpy()


def test_a_crop_is_a_function_of_image_and_key(payload):
    augment = Augmentation(size=24)
    assert np.array_equal(augment.crop(payload, 5), augment.crop(payload, 5))
    assert len({augment.crop(payload, key).tobytes() for key in range(20)}) == 20
    assert augment.crop(payload, 5).shape == (24, 24, 3)
    assert augment.variation(5) == augment.variation(5)
    assert len({augment.variation(key) for key in range(20)}) == 20


def test_nothing_is_changed_where_nothing_may_be(payload):
    square = decode(payload)[:40, :40]
    still = Augmentation(size=40, area_min=1.0, flip=False, photometric="none")
    assert np.array_equal(still.crop(png(square), 1), square)
    assert still.variation(1) == UNCHANGED
    assert np.array_equal(on_device(square, UNCHANGED).round(12), square)


def test_half_of_all_keys_mirror(payload):
    augment = Augmentation(size=40, photometric="none")
    flips = [augment.variation(mixed(key)).flip for key in range(400)]
    assert set(flips) == {0.0, 1.0}
    assert 150 < sum(flips) < 250
    pixels = decode(payload)
    assert np.array_equal(on_device(pixels, Variation(flip=1.0)).round(12), pixels[:, ::-1])


def test_crops_have_the_stated_area_and_aspect(monkeypatch, payload):
    boxes = []
    decode_region = module.decode_region

    def watched(payload, box_of, *how):
        return decode_region(payload, lambda *shape: boxes.append(box_of(*shape)) or boxes[-1], *how)

    monkeypatch.setattr(module, "decode_region", watched)
    for key in range(500):
        Augmentation(size=8, area_min=0.08).crop(payload, mixed(key))
    areas = np.array([(r - left) * (b - t) for left, t, r, b in boxes]) / (50 * 40)
    aspects = np.array([(r - left) / (b - t) for left, t, r, b in boxes])
    assert all(0 <= left < r <= 50 and 0 <= t < b <= 40 for left, t, r, b in boxes)
    assert 0.06 < areas.min() < 0.15
    assert areas.max() > 0.85
    assert 0.38 < areas.mean() < 0.5  # uniform in 0.08 to 1, less the largest that do not fit
    assert 0.65 < aspects.min() < aspects.max() < 1.5


def test_full_distortion_is_stronger_than_reduced():
    def spread(photometric: str) -> float:
        augment = Augmentation(size=16, photometric=photometric)
        return float(np.std([augment.variation(mixed(key))[1:] for key in range(200)]))

    assert spread("none") == 0 < spread("reduced") < spread("full")


@pytest.mark.parametrize(
    ("variation", "enhancer", "factor"),
    [
        (Variation(brightness=1.3), ImageEnhance.Brightness, 1.3),
        (Variation(contrast=0.6), ImageEnhance.Contrast, 0.6),
        (Variation(saturation=0.5), ImageEnhance.Color, 0.5),
    ],
)
def test_each_distortion_is_the_one_that_pillow_has(payload, variation, enhancer, factor):
    expected = np.asarray(enhancer(Image.fromarray(decode(payload))).enhance(factor)).astype(float)
    assert np.abs(on_device(decode(payload), variation) - expected).max() <= 1.5  # Pillow rounds its greys


def test_an_image_on_the_device_does_not_depend_on_its_batch():
    images_NCHW = torch.stack(
        [torch.from_numpy(decode(noise_image(seed, 20, 17))).permute(2, 0, 1) for seed in range(7)]
    )
    variation_NV = torch.tensor([Augmentation(17).variation(mixed(key)) for key in range(7)], dtype=torch.float64)
    together = PLAIN(images_NCHW, variation_NV, torch.float32)
    apart = torch.cat([PLAIN(i[None], v[None], torch.float32) for i, v in zip(images_NCHW, variation_NV, strict=True)])
    assert torch.equal(together, apart)


def test_an_empty_share_is_prepared():
    empty = PLAIN(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 4, dtype=torch.float64), torch.float32)
    assert empty.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(60, 50), (16, 90), (8, 8), (33, 24)])
def test_resizing_is_within_one_level_of_pillows(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resized(pixels, 24).astype(int) - expected).max() <= 1
    strided = np.random.default_rng(1).integers(0, 256, (shape[0], 200, 3), dtype=np.uint8)[:, 7 : 7 + shape[1]]
    assert np.array_equal(resized(strided, 24), resized(np.ascontiguousarray(strided), 24))


@pytest.mark.parametrize("width", [50, 24, 1])
def test_a_resized_image_lies_in_memory_as_a_batch_does(width):
    wide = np.zeros((40, 60, 3), np.uint8)
    assert resized(wide[:, 5 : 5 + width], 24).flags["C_CONTIGUOUS"]


def test_evaluation_sees_the_centre(payload):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 10:50] = 200
    assert (CentreCrop(size=20, fraction=1.0).crop(png(image)) == 200).all()
    image[:, 20:40] = 100
    assert (CentreCrop(size=20, fraction=0.5).crop(png(image)) == 100).all()
    assert CentreCrop(size=20, fraction=0.5).crop(payload).shape == (20, 20, 3)
