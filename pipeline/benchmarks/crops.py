"""Decode and crop: the bytes of a JPEG in memory -> a random resized crop, uint8 (size, size, 3), by ours and others.

Every contender takes the same boxes, drawn by ours and free of charge to the others' own drawing, but DALI, which
draws its own of the same distribution.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
import torch
from PIL import Image

from pipeline.benchmarks.rounds import Contender, Work
from pipeline.data import decode
from pipeline.data.augment import Augmentation
from pipeline.data.decode import Pixels
from pipeline.data.keyed_random import mixed

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
Crop = Callable[[bytes, int], Pixels]  # (bytes, key) -> the crop that the key chooses


@dataclass(frozen=True, slots=True)
class CropTask:
    """Images of which every contender can make a crop."""

    payloads: Sequence[bytes]
    size: int
    batch: int  # for those who work in batches


def is_common(payload: bytes) -> bool:
    """Whether all contenders read it: a JPEG in gray or YCbCr. torchvision and simplejpeg refuse CMYK, some PNG."""
    try:
        return simplejpeg.decode_jpeg_header(payload)[2] in ("Gray", "YCbCr", "RGB")
    except ValueError:
        return False


def key_of(number: int, image: int) -> int:
    """Key of an image's crop in a round."""
    return mixed(number, image)


def ours(augment: Augmentation) -> Crop:
    return augment.crop


def ours_plain(augment: Augmentation) -> Crop:
    decode.jpeg_region = None  # type: ignore[attr-defined, assignment]  # this process is the contender's alone
    return augment.crop


def pillow(augment: Augmentation) -> Crop:
    from torchvision.transforms.v2 import functional

    size = [augment.size, augment.size]

    def crop(payload: bytes, key: int) -> Pixels:
        with Image.open(io.BytesIO(payload)) as file:
            image = file.convert("RGB")
        left, top, right, bottom = augment.box(*image.size, key)
        pixels: Pixels = np.asarray(functional.resized_crop(image, top, left, bottom - top, right - left, size))
        return pixels

    return crop


def torchvision(augment: Augmentation) -> Crop:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional

    size = [augment.size, augment.size]

    def crop(payload: bytes, key: int) -> Pixels:
        image_CHW = decode_jpeg(torch.frombuffer(bytearray(payload), dtype=torch.uint8), mode=ImageReadMode.RGB)
        left, top, right, bottom = augment.box(image_CHW.shape[2], image_CHW.shape[1], key)
        output = functional.resized_crop(image_CHW, top, left, bottom - top, right - left, size, antialias=True)
        pixels: Pixels = output.permute(1, 2, 0).numpy()
        return pixels

    return crop


def simplejpeg_opencv(augment: Augmentation) -> Crop:
    import cv2

    cv2.setNumThreads(1)

    def crop(payload: bytes, key: int) -> Pixels:
        image_HWC = simplejpeg.decode_jpeg(payload, colorspace="RGB")
        left, top, right, bottom = augment.box(image_HWC.shape[1], image_HWC.shape[0], key)
        region = image_HWC[top:bottom, left:right]
        pixels: Pixels = cv2.resize(region, (augment.size, augment.size), interpolation=cv2.INTER_AREA)
        return pixels

    return crop


def nvimgcodec(augment: Augmentation) -> Crop:
    import cv2
    from nvidia import nvimgcodec as codec

    cv2.setNumThreads(1)
    decoder = codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[codec.Backend(codec.CPU_ONLY)]
    )
    params = codec.DecodeParams(apply_exif_orientation=False)  # as the others, to whom the boxes apply

    def crop(payload: bytes, key: int) -> Pixels:
        stream = codec.CodeStream(payload)
        left, top, right, bottom = augment.box(stream.width, stream.height, key)
        image = decoder.decode(stream.get_sub_code_stream(region=codec.Region(top, left, bottom, right)), params=params)
        region = np.asarray(image.cpu())
        pixels: Pixels = cv2.resize(region, (augment.size, augment.size), interpolation=cv2.INTER_AREA)
        return pixels

    return crop


def _one_by_one(crop_with: Callable[[Augmentation], Crop], task: CropTask) -> Work:
    crop = crop_with(Augmentation(size=task.size, area_min=AREA[0]))

    def work(number: int) -> int:
        for image, payload in enumerate(task.payloads):
            crop(payload, key_of(number, image))
        return len(task.payloads)

    return work


def dali(task: CropTask) -> Work:
    from nvidia.dali import fn, pipeline_def, types

    waiting: list[list[np.ndarray]] = []

    def following() -> list[np.ndarray]:  # DALI inspects its source, and a method of a list defeats it
        return waiting.pop()

    @pipeline_def(batch_size=task.batch, num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1)
    def graph():  # type: ignore[no-untyped-def]
        encoded = fn.external_source(source=following, batch=True, dtype=types.UINT8, ndim=1)
        return dali_crop(encoded, task.size)

    arrays = [np.frombuffer(payload, np.uint8) for payload in task.payloads]
    batches = [arrays[first : first + task.batch] for first in range(0, len(arrays), task.batch)]
    pipe = graph()
    pipe.build()

    def work(number: int) -> int:
        done = 0
        waiting.extend(batches)
        for _ in batches:
            (crops,) = pipe.run()
            done += len(crops)
        return done

    return work


def dali_crop(encoded, size: int):  # type: ignore[no-untyped-def]  # nodes of a DALI graph
    """DALI's decoding of a random region, resized as it does by default."""
    from nvidia.dali import fn

    region = fn.decoders.image_random_crop(
        encoded, device="cpu", random_area=list(AREA), random_aspect_ratio=list(ASPECT), num_attempts=10
    )
    return fn.resize(region, size=[size, size])


def entropy(task: CropTask) -> Work:
    extension = decode.jpeg_region  # type: ignore[attr-defined]  # None where it was not built
    if extension is None:
        raise ImportError("the extension was not built", name="pipeline.data.jpeg_region")

    def work(number: int) -> int:
        for payload in task.payloads:
            extension.read_entropy(payload)
        return len(task.payloads)

    return work


FLOOR = Contender("entropy", "floor: Huffman codes of the whole image, no pixel", entropy, peer=False)
CONTENDERS: list[Contender[CropTask]] = [
    Contender("ours", "Augmentation.crop: region, 1/2 to 1/8 scale, torch resize", partial(_one_by_one, ours), False),
    Contender("ours-plain", "the same where the extension was not built", partial(_one_by_one, ours_plain), False),
    Contender("pillow", "Pillow decode, torchvision v2 resized_crop", partial(_one_by_one, pillow)),
    Contender("torchvision", "torchvision.io.decode_jpeg, v2 resized_crop", partial(_one_by_one, torchvision)),
    Contender("simplejpeg", "simplejpeg decode, crop, OpenCV area resize", partial(_one_by_one, simplejpeg_opencv)),
    Contender("nvimgcodec", "nvimgcodec CPU region, OpenCV area resize", partial(_one_by_one, nvimgcodec)),
    Contender("dali", "DALI CPU image_random_crop, resize; its own boxes", dali),
    FLOOR,
]
