import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional

from pipeline.data.augment import Augmentation
from pipeline.data.decode import decode
from pipeline.data.keyed_random import mixed
from pipeline.data.policy import OPERATIONS, Policy
from tests.conftest import noise_image

PIXELS = decode(noise_image(3, 32, 32)) // 2 + 30  # of less than the whole range, which autocontrast widens
NAMES = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
         "sharpness", "posterize", "solarize", "autocontrast", "equalize")  # fmt: skip
GREY = [128.0, 128.0, 128.0]


def torchvisions(name: str, image: Image.Image, strength: float) -> Image.Image:
    """What torchvision's RandAugment makes of it."""
    degrees = math.degrees(math.atan(0.3 * strength))
    moved = int(150 / 331 * 32 * strength)

    def affine(translate=(0, 0), shear=(0.0, 0.0)):
        return functional.affine(image, 0.0, list(translate), 1.0, list(shear), fill=GREY, center=[16.0, 16.0])

    return {
        "identity": lambda: image,
        "shear_x": lambda: affine(shear=(degrees, 0.0)),
        "shear_y": lambda: affine(shear=(0.0, degrees)),
        "translate_x": lambda: affine(translate=(moved, 0)),
        "translate_y": lambda: affine(translate=(0, moved)),
        "rotate": lambda: functional.rotate(image, 30 * strength, fill=GREY),
        "brightness": lambda: functional.adjust_brightness(image, 1 + 0.9 * strength),
        "color": lambda: functional.adjust_saturation(image, 1 + 0.9 * strength),
        "contrast": lambda: functional.adjust_contrast(image, 1 + 0.9 * strength),
        "sharpness": lambda: functional.adjust_sharpness(image, 1 + 0.9 * strength),
        "posterize": lambda: functional.posterize(image, 8 - round(4 * strength)),
        "solarize": lambda: functional.solarize(image, round(255 * (1 - strength))),
        "autocontrast": lambda: functional.autocontrast(image),
        "equalize": lambda: functional.equalize(image),
    }[name]()


@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=NAMES)
@pytest.mark.parametrize("strength", [0.9, 0.3, -0.6])
def test_each_operation_is_torchvisions(number, strength):
    operation, signed = OPERATIONS[number]
    strength = strength if signed else abs(strength)
    image = Image.fromarray(PIXELS)
    found = np.asarray(operation(image, strength)).astype(int)
    expected = np.asarray(torchvisions(NAMES[number], image, strength)).astype(int)
    assert (found != expected).any(2).mean() < 0.02  # of sheared pixels a few are nearest to two
    assert NAMES[number] == "identity" or strength == 0.3 or (found != PIXELS).any()


def test_a_policy_is_a_function_of_crop_and_key():
    policy = Policy(2, 9.0, 0.5)
    assert np.array_equal(policy.applied(PIXELS, 5), policy.applied(PIXELS, 5))
    found = {policy.applied(PIXELS, mixed(key)).tobytes() for key in range(60)}
    assert len(found) > 40
    assert policy.applied(PIXELS, 5).shape == PIXELS.shape
    assert policy.applied(PIXELS, 5).dtype == np.uint8
    assert np.array_equal(Policy(0, 9.0).applied(PIXELS, 5), PIXELS)


def test_a_stronger_policy_changes_more():
    def change(magnitude: float) -> float:
        applied = (Policy(2, magnitude).applied(PIXELS, mixed(key)).astype(int) for key in range(80))
        return float(np.mean([np.abs(pixels - PIXELS).mean() for pixels in applied]))

    assert change(1.0) < change(5.0) < change(10.0)


def test_the_policy_follows_the_crop_and_leaves_its_draws_alone():
    payload = noise_image(3, 50, 40)
    plain, varied = Augmentation(24), Augmentation(24, policy=Policy(3, 9.0, 0.5))
    assert plain.variation(8) == varied.variation(8)
    for key in range(5):
        assert np.array_equal(varied.crop(payload, key), varied.policy.applied(plain.crop(payload, key), key))
    assert varied.at(-1) == plain  # of images to estimate statistics of
