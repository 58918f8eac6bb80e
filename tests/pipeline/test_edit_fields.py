"""The fields of edits: what a variant takes, and which rule each wrong value breaks."""

from __future__ import annotations

import io
from base64 import b64encode, encodebytes
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kit.errors import RequestError
from kit.variants import VARIANTS, Variant
from pipeline import edit_fields, pictures
from pipeline.edit_fields import reference_tokens
from pipeline.request import Limits, check

KLEIN, KV, DEV = VARIANTS["klein-4b"], VARIANTS["klein-9b-kv"], VARIANTS["dev"]


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = png(101, 70)


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        (KLEIN, {"images": [b""]}, r"images\[0\]: 0 bytes"),
        (KLEIN, {"images": [IMAGE, b"a text"]}, r"images\[1\]: 6 bytes that are not a PNG, JPEG or WebP image"),
        (KLEIN, {"images": [b"a text"]}, r"images\[0\]: .* nor the base64 of one"),
        (KLEIN, {"images": [b64encode(b"a text")]}, r"images\[0\]: 6 bytes that are not a PNG, JPEG or WebP image"),
        (KLEIN, {"images": [png(32, 64)]}, r"images\[0\]: 32 x 64 pixels; each side must have at least 64"),
        (KLEIN, {"images": [IMAGE] * 5}, "images: 5 references; klein-4b takes at most 4"),
        (DEV, {"images": [IMAGE] * 11}, "images: 11 references; dev takes at most 10"),
        (KLEIN, {"images": IMAGE}, "images: expected a list of encoded images, each as bytes"),
        (KLEIN, {"images": 3}, "images: expected a list of encoded images, each as bytes"),
        (KLEIN, {"images": ["a.png"]}, "images: expected a list of encoded images, each as bytes"),
        (KLEIN, {"mask": IMAGE}, r"mask: there is no image to repaint; send it as images\[0\]"),
        (KLEIN, {"images": [IMAGE], "mask": "m.png"}, "mask: expected one encoded image, as bytes"),
        (KLEIN, {"images": [IMAGE], "mask": png(101, 71)}, r"mask: 101 x 71 pixels; images\[0\] has 101 x 70"),
        (
            KLEIN,
            {"images": [IMAGE], "mask": IMAGE, "width": 512},
            r"width: 512; with a mask .* of images\[0\], 96",
        ),
        (KLEIN, {"images": [IMAGE], "mask": IMAGE, "strength": 0.0}, "strength: 0 is not between 0.001 and 1"),
        (KLEIN, {"images": [IMAGE], "mask": IMAGE, "strength": float("nan")}, "strength: nan is not between"),
        (KLEIN, {"images": [IMAGE], "strength": 0.5}, "strength: it has no effect without a mask; leave it out"),
        (KV, {"images": [IMAGE], "mask": IMAGE}, "mask: inpainting is defined for klein and klein-base, not for klein"),
        (DEV, {"images": [IMAGE], "mask": IMAGE}, "mask: inpainting is defined for klein and klein-base, not for dev"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(variant: Variant, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check({"prompt": "make it blue"} | fields, variant, Limits())


@pytest.mark.parametrize(("variant", "most"), [(KLEIN, 4), (KV, 4), (DEV, 10)])
def test_the_most_references_are_taken_and_the_first_gives_the_size(variant: Variant, most: int) -> None:
    request = check({"prompt": "x", "images": [IMAGE, *[png(64, 64)] * (most - 1)]}, variant, Limits())
    assert (len(request.images), request.width, request.height) == (most, 96, 64)
    chosen = check({"prompt": "x", "images": [IMAGE], "width": 256, "height": 128}, variant, Limits())
    assert (chosen.width, chosen.height) == (256, 128)


def test_a_mask_has_the_strength_of_diffusers_by_default() -> None:
    request = check({"prompt": "x", "images": [IMAGE], "mask": IMAGE}, KLEIN, Limits())
    assert (request.mask, request.strength, request.width, request.height) == (IMAGE, 0.8, 96, 64)


def test_base64_is_taken_as_well_with_and_without_line_ends() -> None:
    fields = {"prompt": "x", "images": [b64encode(IMAGE), encodebytes(IMAGE), IMAGE], "mask": b64encode(IMAGE)}
    request = check(fields, KLEIN, Limits())
    assert (request.images, request.mask) == ((IMAGE, IMAGE, IMAGE), IMAGE)


def test_base64_that_is_too_long_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 6)
    monkeypatch.setattr(edit_fields, "BASE64_BYTES", 8)
    with pytest.raises(RequestError, match=r"images\[0\]: 12 bytes; the limit is 6, or 8 in base64"):
        check({"prompt": "x", "images": [b64encode(b"a text..")]}, KLEIN, Limits())


@pytest.mark.parametrize(
    ("limits", "count", "message"),
    [
        (Limits(max_references=2), 3, "images: 3 references; this deployment takes at most 2"),
        (Limits(max_references=7), 5, "images: 5 references; klein-4b takes at most 4"),
        (Limits(max_references=0), 1, "images: this deployment takes no references; write it with --max-references 1"),
        (Limits(no_references="it has no VAE encoder"), 1, "images: it has no VAE encoder"),
    ],
)
def test_a_deployment_limits_the_references(limits: Limits, count: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check({"prompt": "x", "images": [IMAGE] * count}, KLEIN, limits)
    check({"prompt": "x", "images": []}, KLEIN, limits)


def test_a_strength_that_travelled_as_fp32_is_the_number_that_was_sent() -> None:
    for strength in (0.8, 0.7, 0.333, 1.0, 0.001):
        fields = {"prompt": "x", "images": [IMAGE], "mask": IMAGE, "strength": np.float32(strength)}
        assert check(fields, KLEIN, Limits()).strength == strength


def test_tokens_of_references_are_those_of_what_remains_of_them() -> None:
    assert reference_tokens([IMAGE, png(2048, 2048)]) == 6 * 4 + 64 * 64
    assert reference_tokens([]) == 0
