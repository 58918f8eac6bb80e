"""Encode pixels as PNG, JPEG or WebP, and decode them."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.request import Encoding, ImageFormat

# png: level 3 takes a third of the time of Pillow's default level and gives about 3 % more bytes
_OPTIONS: dict[ImageFormat, dict[str, int | bool]] = {
    "png": {"compress_level": 3},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 2},
}


def encode(pixels: npt.NDArray[np.uint8], output_format: ImageFormat) -> bytes:
    """Encode one image [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=output_format, **_OPTIONS[output_format])
    return buffer.getvalue()


def encode_response(image: bytes, encoding: Encoding) -> bytes:
    """Return an encoded image as a response holds it: as it is, or in base64."""
    return base64.b64encode(image) if encoding == "base64" else image


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode an encoded image to [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
