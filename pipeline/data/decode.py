"""Image bytes to pixels: uint8 (H, W, 3) in RGB, by what the bytes are, never by what the file is called."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

# Pillow's own limit, beyond which it refuses: a small file may not unpack to gigabytes.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)

_SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


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
    if payload.startswith(b"\xff\xd8\xff"):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
            if colours in ("Gray", "YCbCr", "RGB") and height * width <= MAX_PIXELS:
                pixels: Pixels = simplejpeg.decode_jpeg(payload, colorspace="RGB")
                return pixels
        except ValueError:
            pass  # Pillow decides, and says what is wrong
    try:
        with Image.open(io.BytesIO(payload), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them to 255, not scale them
                grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return np.asarray(image.convert("RGB"))
            rgba = image.convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    except UnidentifiedImageError:
        raise DecodeError("not a JPEG, PNG or WebP image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from None
