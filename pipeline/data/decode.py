"""Image bytes to pixels: uint8 (H, W, 3) in RGB, by what the bytes are, never by what the file is called.

A training crop needs a part of an image only, so a part is what is decoded (jpeg_region.c). Where that
extension was not built, or the image is no plain JPEG, all of it is decoded and then cut: the same bits.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

try:
    from pipeline.data import jpeg_region
except ImportError:  # no compiler or no header of libjpeg-turbo when this was installed
    jpeg_region = None  # type: ignore[assignment]

REGIONS, WHOLE = "regions", "whole"
DECODER = REGIONS if jpeg_region else WHOLE  # what this installation can do
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

# Pillow's own limit, beyond which it refuses: a small file may not unpack to gigabytes.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)

_SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))
_END_OF_JPEG = b"\xff\xd9"
_TRAILER = 1024  # bytes behind an image in which its end is still looked for: cameras and editors leave some


class DecodeError(ValueError):
    """Bytes that are no image, or a damaged one."""


def image_type(payload: bytes) -> str | None:
    """What the first bytes say: "jpg", "png", "webp", or None."""
    for signature, name in _SIGNATURES:
        if payload.startswith(signature):
            return name
    return "webp" if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP" else None


def decode(payload: bytes) -> Pixels:
    """Pixels of a JPEG, PNG or WebP. Raises DecodeError.

    libjpeg-turbo where it can; CMYK and what it refuses go through Pillow, which also undoes Adobe's
    inverted CMYK. Grayscale and palettes become RGB; transparency is laid on white.
    """
    if _plain_jpeg_size(payload):
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(payload, colorspace="RGB")
            return pixels
        except ValueError:
            pass  # Pillow decides, and says what is wrong
    return _decoded_by_pillow(payload)


def decode_region(payload: bytes, box_of: Callable[[int, int], Box], size: int, decoder: str = "") -> Pixels:
    """Pixels of the box that box_of(width, height) chooses, to be resized to size x size. Raises DecodeError.

    A box at least twice as large as needed is decoded at 1/2, 1/4 or 1/8 by the inverse transform itself:
    fewer pixels, and another low-pass filter than resizing alone (measured in benchmarks.md).
    decoder: REGIONS or WHOLE; "" = what there is. Sound images give the same bits; of one that was damaged before it
    was packed, regions above the damage are as whole as ever to one, while the other leaves all of it to Pillow.
    """
    shape = _plain_jpeg_size(payload)
    if shape is not None:
        box, denominator = box_of(*shape), 1
        shorter = min(box[2] - box[0], box[3] - box[1])
        while denominator < 8 and shorter >= 2 * denominator * size:
            denominator *= 2
        try:
            return _jpeg_region(payload, shape, box, denominator, decoder or DECODER)
        except ValueError:
            pass
    pixels = _decoded_by_pillow(payload)
    left, top, right, bottom = box_of(pixels.shape[1], pixels.shape[0])
    return pixels[top:bottom, left:right]


def _plain_jpeg_size(payload: bytes) -> tuple[int, int] | None:
    """(width, height) of a whole JPEG in gray or YCbCr that libjpeg-turbo may decode, else None.

    One that lacks its end is Pillow's to judge, with the extension as without it: a region may lie above the cut.
    """
    if not payload.startswith(b"\xff\xd8\xff") or payload.rfind(_END_OF_JPEG, -_TRAILER) < 0:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    except (ValueError, KeyError):  # KeyError: sampling factors that simplejpeg does not know
        return None
    return (width, height) if colours in ("Gray", "YCbCr", "RGB") and 0 < height * width <= MAX_PIXELS else None


def _jpeg_region(payload: bytes, shape: tuple[int, int], box: Box, denominator: int, decoder: str) -> Pixels:
    """The box (in pixels of the whole image) at 1/denominator. Raises ValueError for a damaged image."""
    width, height = (-(-side // denominator) for side in shape)
    left, top = box[0] // denominator, box[1] // denominator
    right, bottom = (-(-edge // denominator) for edge in box[2:])
    if jpeg_region is None or decoder == WHOLE:
        options = {} if denominator == 1 else {"min_height": height, "min_width": width, "min_factor": 1}
        whole: Pixels = simplejpeg.decode_jpeg(payload, colorspace="RGB", **options)
        return whole[top:bottom, left:right]
    pixels, first, columns = jpeg_region.decode(payload, left, top, right, bottom, denominator)
    rows_HWC = np.frombuffer(pixels, np.uint8).reshape(bottom - top, columns, 3)
    return rows_HWC[:, left - first : right - first]


def _decoded_by_pillow(payload: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(payload), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them to 255, not scale them
                grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return np.array(image.convert("RGB"))
            rgba = image.convert("RGBA")
            return np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    except UnidentifiedImageError:
        raise DecodeError("not a JPEG, PNG or WebP image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from None
