"""Reference images as diffusers prepares them: limited in area, cropped to whole tokens, encoded, packed in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from kit.dtypes import Compute, numpy_type
from kit.engine import Engine
from kit.errors import RequestError
from kit.image_size import PIXELS_PER_TOKEN
from pipeline.position_ids import reference_ids

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
MAX_AREA = 1024 * 1024  # pixels; larger references are scaled down to it
MIN_SIDE, MAX_ASPECT = 64, 8  # what diffusers accepts


@dataclass(frozen=True, eq=False)
class References:
    """The tokens of a request's references: latents [R, 128] and position ids [R, 4]."""

    latents: Float32
    ids: Int64


def check_size(width: int, height: int, field: str) -> None:
    """Raise RequestError if diffusers would refuse a reference of this size."""
    if min(width, height) < MIN_SIDE:
        raise RequestError(f"{field}: {width} x {height} pixels; each side must have at least {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"{field}: {width} x {height} pixels; the longer side may be {MAX_ASPECT} times the shorter")


def limited_size(width: int, height: int) -> tuple[int, int]:
    """Return the size to which an image is scaled so that it does not exceed the area limit."""
    if width * height <= MAX_AREA:
        return width, height
    scale = math.sqrt(MAX_AREA / (width * height))
    return int(width * scale), int(height * scale)


def whole_tokens(width: int, height: int) -> tuple[int, int]:
    """Return the size that remains of an image: within the area limit, each side rounded down to whole tokens."""
    width, height = limited_size(width, height)
    return width - width % PIXELS_PER_TOKEN, height - height % PIXELS_PER_TOKEN


def prepare(image: Image.Image) -> Float32:
    """Scale an RGB image down to the area limit and crop its centre to whole tokens: [3, H, W] in -1 to 1."""
    width, height = whole_tokens(*image.size)
    limited = limited_size(*image.size)
    if limited != image.size:
        image = image.resize(limited, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return to_range(image.crop((left, top, left + width, top + height)))


def to_range(image: Image.Image) -> Float32:
    """Return the pixels of an RGB image as [3, H, W] in -1 to 1."""
    unit = np.asarray(image).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((2 * unit - 1).transpose(2, 0, 1))


def encode(pixels: Float32, vae_encoder: Engine, compute: Compute) -> Float32:
    """Encode one image [3, H, W] to normalized latents [128, H / 16, W / 16]."""
    (latents,) = vae_encoder.run({"image": pixels[None].astype(numpy_type(compute), copy=False)})["latents"]
    return np.asarray(latents, np.float32)


def pack(encoded: Sequence[Float32]) -> References:
    """Join the latents of references, each [128, h, w], to tokens in their order."""
    tokens = [latents.reshape(len(latents), -1).T for latents in encoded]
    return References(np.concatenate(tokens), reference_ids([(x.shape[1], x.shape[2]) for x in encoded]))
