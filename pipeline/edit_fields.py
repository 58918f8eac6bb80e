"""The fields of a request that edits images: references, the mask of what is repainted, and the strength of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kit.errors import RequestError
from kit.image_size import PIXELS_PER_TOKEN
from kit.variants import Variant
from pipeline import pictures, references

STRENGTH = 0.8  # diffusers' default
BASE64_BYTES = (pictures.MAX_BYTES + 2) // 3 * 4
MIN_STRENGTH = 0.001  # one step remains of any number that a deployment allows


@dataclass(frozen=True)
class Edit:
    """Checked fields: encoded images in their order, an encoded mask, and the size that the first image implies."""

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    strength: float = STRENGTH
    size: tuple[int, int] | None = None  # width, height


def check_edit(given: Mapping[str, Any], variant: Variant, most: int = 10, none: str = "") -> Edit:
    """Check the fields by the headers of their images; raises RequestError, which names field and rule.

    A deployment takes at most `most` references, and not any if the sentence `none` says why.
    """
    images = _images(given.get("images"), variant, most, none)
    sizes = []
    for i, image in enumerate(images):
        sizes.append(pictures.read_size(image, f"images[{i}]"))
        references.check_size(*sizes[i], f"images[{i}]")
    mask = _plain(given.get("mask"), "mask")
    if mask is None:
        if "strength" in given:
            raise RequestError("strength: it has no effect without a mask; leave it out")
        return Edit(images, size=references.whole_tokens(*sizes[0]) if sizes else None)
    _check_mask(mask, sizes, variant)
    for side, value in zip(("width", "height"), references.whole_tokens(*sizes[0]), strict=True):
        if int(given.get(side, value)) != value:
            raise RequestError(f"{side}: {given[side]}; with a mask the result has the size of images[0], {value}")
    strength = shortest(given.get("strength", STRENGTH))
    if not MIN_STRENGTH <= strength <= 1:
        raise RequestError(f"strength: {strength:g} is not between {MIN_STRENGTH} and 1")
    return Edit(images, mask, strength, references.whole_tokens(*sizes[0]))


def shortest(value: Any) -> float:
    """Return the shortest decimal number that float32 stores as it stores `value`: 0.8 for what arrives as FP32 0.8."""
    return float(str(np.float32(value)))


def reference_tokens(images: Sequence[bytes]) -> int:
    """Return how many tokens checked images have as references."""
    sizes = (references.whole_tokens(*pictures.read_size(image, "images")) for image in images)
    return sum(width * height for width, height in sizes) // PIXELS_PER_TOKEN**2


def _images(value: Any, variant: Variant, most: int, none: str) -> tuple[bytes, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(image, bytes) for image in value):
        raise RequestError("images: expected a list of encoded images, each as bytes")
    if value and none:
        raise RequestError(f"images: {none}")
    if value and not most:
        raise RequestError("images: this deployment takes no references; write it with --max-references 1 or more")
    if len(value) > most < variant.max_references:
        raise RequestError(f"images: {len(value)} references; this deployment takes at most {most}")
    most = variant.max_references
    if len(value) > most:
        raise RequestError(f"images: {len(value)} references; {variant.name} takes at most {most}")
    return tuple(_plain(image, f"images[{i}]") for i, image in enumerate(value))


def _plain(value: Any, field: str) -> Any:
    """Decode the base64 of clients that send JSON; anything else is returned as it is."""
    if not isinstance(value, bytes) or not value or pictures.has_known_start(value):
        return value
    if len(value) > BASE64_BYTES:
        raise RequestError(
            f"{field}: {len(value)} bytes; the limit is {pictures.MAX_BYTES}, or {BASE64_BYTES} in base64"
        )
    try:
        return base64.b64decode(b"".join(value.split()), validate=True)
    except ValueError:
        raise RequestError(
            f"{field}: {len(value)} bytes that are not a PNG, JPEG or WebP image, nor the base64 of one"
        ) from None


def _check_mask(mask: Any, sizes: list[tuple[int, int]], variant: Variant) -> None:
    if variant.family not in ("klein", "klein-base"):
        raise RequestError(f"mask: inpainting is defined for klein and klein-base, not for {variant.name}")
    if not isinstance(mask, bytes):
        raise RequestError("mask: expected one encoded image, as bytes")
    if not sizes:
        raise RequestError("mask: there is no image to repaint; send it as images[0]")
    size = pictures.read_size(mask, "mask")
    if size != sizes[0]:
        raise RequestError(f"mask: {size[0]} x {size[1]} pixels; images[0] has {sizes[0][0]} x {sizes[0][1]}")
