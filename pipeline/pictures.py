"""Decode images that clients send: formats, orientation and depth are settled here, and bad files are refused early.

The header is read before any pixel is decoded, so that an image which would decompress to gigabytes is refused by its
size. What is accepted ends as 8-bit RGB, as diffusers' `load_image` gives it: turned by its EXIF orientation, without
alpha.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kit.errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 32 * 2**20  # of an encoded image
MAX_CHUNKS = 20_000  # of a PNG file; those of the largest that are taken have some thousand
ORIENTATION = 0x0112  # the EXIF tag
MAX_DECODED_PIXELS = 50_000_000  # 150 MB as RGB; the largest phone cameras store as many
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error, zlib.error)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_size(data: bytes, field: str) -> tuple[int, int]:
    """Return width and height of an encoded image as it will be shown, without decoding its pixels.

    Raises RequestError, which names the field, if the bytes are not a PNG, JPEG or WebP image, or if it is too large,
    animated, or of a depth that has no place in 8 bits.
    """
    with _opened(data, field) as image:
        turned = _orientation(data, image) in (5, 6, 7, 8)  # by 90 or 270 degrees
        return (image.height, image.width) if turned else (image.width, image.height)


def decode_rgb(data: bytes, field: str) -> Image.Image:
    """Decode an image to 8-bit RGB in the orientation of its EXIF data; raises RequestError as `read_size` does."""
    with _opened(data, field) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # grey of 16 bits; Pillow would clip it to white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def has_known_start(data: bytes) -> bool:
    """Return whether bytes begin as a PNG, JPEG or WebP image does."""
    return data.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _orientation(data: bytes, image: Image.Image) -> int:
    """Return the orientation of an opened image's EXIF data, 1 without it; no pixel is decoded."""
    if image.format != "PNG" or "exif" in image.info or "Raw profile type exif" in image.info:
        return int(image.getexif().get(ORIENTATION, 1))
    found = _late_exif(data)  # Pillow decodes the pixels to look behind them
    if found is None:
        return 1
    exif = Image.Exif()
    exif.load(b"Exif\x00\x00" + found)
    return int(exif.get(ORIENTATION, 1))


def _late_exif(data: bytes) -> bytes | None:
    """Return the eXIf chunk of a PNG file, wherever it stands."""
    at = 8
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return None
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"eXIf":
            return data[at + 8 : at + 8 + size]
        at += 12 + size
    raise ValueError(f"more than {MAX_CHUNKS} chunks")


@contextmanager
def _opened(data: bytes, field: str) -> Iterator[Image.Image]:
    """Open an image, check its header, and turn what Pillow raises about damaged files into a RequestError."""
    if not data:
        raise RequestError(f"{field}: 0 bytes; expected a PNG, JPEG or WebP image")
    if len(data) > MAX_BYTES:
        raise RequestError(f"{field}: {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, field)
            yield image
    except UnidentifiedImageError:
        raise RequestError(f"{field}: {len(data)} bytes that are not a PNG, JPEG or WebP image") from None
    except _TOO_LARGE:
        raise RequestError(f"{field}: the image exceeds the limit of {MAX_DECODED_PIXELS} pixels") from None
    except _DAMAGE as error:
        raise RequestError(f"{field}: the image is damaged or truncated: {error}") from None


def _check_header(image: Image.Image, field: str) -> None:
    pixels = image.width * image.height
    if pixels > MAX_DECODED_PIXELS:
        raise RequestError(
            f"{field}: {image.width} x {image.height} is {pixels} pixels; the limit is {MAX_DECODED_PIXELS}"
        )
    # MPO is a JPEG with more pictures behind the one that is shown, as phones store depth
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise RequestError(f"{field}: the image is animated; send one frame")
    if image.mode in ("I", "F"):
        raise RequestError(f"{field}: 32-bit pixels; send an image with 8 or 16 bits per channel")
