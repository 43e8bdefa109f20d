import numpy as np
import pytest

from pipeline.data.augment import Augmentation, CentreCrop
from pipeline.data.decode import decode
from pipeline.data.keyed_random import mixed
from tests.conftest import noise_image


@pytest.fixture
def image() -> np.ndarray:
    return decode(noise_image(3, 50, 40))


def test_pixels_are_a_function_of_image_and_key(image):
    augment = Augmentation(size=24)
    assert np.array_equal(augment(image, 5), augment(image, 5))
    assert len({augment(image, key).tobytes() for key in range(20)}) == 20
    assert augment(image, 5).shape == (24, 24, 3)


def test_nothing_is_changed_where_nothing_may_be(image):
    square = image[:40, :40]
    still = Augmentation(size=40, area_min=1.0, flip=False, photometric="none")
    assert np.array_equal(still(square, 1), square)


def test_half_of_all_keys_mirror(image):
    square = np.ascontiguousarray(image[:40, :40])
    augment = Augmentation(size=40, area_min=1.0, photometric="none")
    mirrored = [np.array_equal(augment(square, mixed(key)), square[:, ::-1]) for key in range(400)]
    assert 150 < sum(mirrored) < 250


def test_crops_have_the_stated_area_and_aspect(monkeypatch, image):
    from pipeline.data import augment as module

    boxes = []
    resized = module._resized
    monkeypatch.setattr(module, "_resized", lambda image, box, size: (boxes.append(box), resized(image, box, size))[1])
    for key in range(500):
        Augmentation(size=8, area_min=0.08)(image, mixed(key))
    areas = np.array([(r - left) * (b - t) for left, t, r, b in boxes]) / (50 * 40)
    aspects = np.array([(r - left) / (b - t) for left, t, r, b in boxes])
    assert all(0 <= left < r <= 50 and 0 <= t < b <= 40 for left, t, r, b in boxes)
    assert 0.06 < areas.min() < 0.15
    assert areas.max() > 0.85
    assert 0.38 < areas.mean() < 0.5  # uniform in 0.08 to 1, less the largest that do not fit
    assert 0.65 < aspects.min() < aspects.max() < 1.5


def test_full_distortion_is_stronger_than_reduced(image):
    def spread(photometric: str) -> float:
        augment = Augmentation(size=16, area_min=1.0, flip=False, photometric=photometric)
        return float(np.std([augment(image, mixed(key)).mean() for key in range(200)]))

    assert spread("none") == 0 < spread("reduced") < spread("full")


def test_evaluation_sees_the_centre():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 10:50] = 200
    assert (CentreCrop(size=20, fraction=1.0)(image)[:, 1:-1] == 200).all()
    assert (CentreCrop(size=40, fraction=1.0)(np.zeros((40, 60, 3), np.uint8)) == 0).all()
    assert CentreCrop(size=20, fraction=0.5)(image).shape == (20, 20, 3)
