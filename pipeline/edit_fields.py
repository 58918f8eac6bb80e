"""The fields of a request that edits images: references, the mask of what is repainted, and the strength of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kit.errors import RequestError
from kit.variants import Variant
from pipeline import pictures, references

EDIT_FIELDS = ("images", "mask", "strength")
STRENGTH = 0.8  # diffusers' default
MIN_STRENGTH = 0.001  # one step remains of any number that a deployment allows


@dataclass(frozen=True)
class Edit:
    """Checked fields: encoded images in their order, an encoded mask, and the size that the first image implies."""

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    strength: float = STRENGTH
    size: tuple[int, int] | None = None  # width, height


def check_edit(given: Mapping[str, Any], variant: Variant) -> Edit:
    """Check the fields by the headers of their images; raises RequestError, which names field and rule."""
    images = _images(given.get("images"), variant)
    sizes = []
    for i, image in enumerate(images):
        sizes.append(pictures.read_size(image, f"images[{i}]"))
        references.check_size(*sizes[i], f"images[{i}]")
    mask = given.get("mask")
    if mask is None:
        if "strength" in given:
            raise RequestError("strength: it has no effect without a mask; leave it out")
        return Edit(images, size=references.whole_tokens(*sizes[0]) if sizes else None)
    _check_mask(mask, sizes, variant)
    for side, value in zip(("width", "height"), references.whole_tokens(*sizes[0]), strict=True):
        if int(given.get(side, value)) != value:
            raise RequestError(f"{side}: {given[side]}; with a mask the result has the size of images[0], {value}")
    strength = float(given.get("strength", STRENGTH))
    if not MIN_STRENGTH <= strength <= 1:
        raise RequestError(f"strength: {strength:g} is not between {MIN_STRENGTH} and 1")
    return Edit(images, mask, strength, references.whole_tokens(*sizes[0]))


def _images(value: Any, variant: Variant) -> tuple[bytes, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(image, bytes) for image in value):
        raise RequestError("images: expected a list of encoded images, each as bytes")
    most = variant.max_references
    if len(value) > most:
        raise RequestError(f"images: {len(value)} references; {variant.name} takes at most {most}")
    return tuple(value)


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
