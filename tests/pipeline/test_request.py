"""The rules of a request, each with its message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kit.errors import RequestError, UsageError
from kit.variants import VARIANTS
from pipeline.request import FIELDS, Limits, check

KLEIN, BASE, DEV = VARIANTS["klein-4b"], VARIANTS["klein-base-4b"], VARIANTS["dev"]


def test_defaults_are_those_of_the_variant() -> None:
    request = check({"prompt": "a cat"}, KLEIN, Limits())
    assert (request.width, request.height, request.steps, request.guidance) == (1024, 1024, 4, 1.0)
    assert (request.num_images, request.output_format, request.negative_prompt) == (1, "png", "")
    assert check({"prompt": "a cat"}, DEV, Limits()).guidance == 4.0
    assert check({"prompt": "a cat"}, BASE, Limits()).steps == 50


def test_sigmas_give_the_number_of_steps() -> None:
    request = check({"prompt": "a cat", "sigmas": [1.0, 0.65, 0.0003]}, DEV, Limits())
    assert (request.sigmas, request.steps) == ((1.0, 0.65, 0.0003), 3)
    assert check({"prompt": "a cat"}, DEV, Limits()).sigmas == ()


def test_images_are_returned_as_bytes_unless_the_request_says_base64() -> None:
    assert check({"prompt": "a cat"}, KLEIN, Limits()).response_encoding == "bytes"
    assert check({"prompt": "a cat", "response_encoding": b"BASE64"}, KLEIN, Limits()).response_encoding == "base64"


def test_a_missing_seed_is_random() -> None:
    seeds = {check({"prompt": "a cat"}, KLEIN, Limits()).seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_fields_that_are_none_take_their_defaults() -> None:
    fields: dict[str, Any] = {field.name: None for field in FIELDS}
    assert check(fields | {"prompt": b"a cat", "seed": np.int64(5)}, KLEIN, Limits()).seed == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100}, "width: 100 is not a multiple of 16; nearest: 96 or 112"),
        ({"height": 1000}, "height: 1000 is not a multiple of 16; nearest: 992 or 1008"),
        ({"width": 4096}, "width: 4096 is not between 64 and 2048 pixels"),
        ({"height": 0}, "height: 0 is not between 64 and 2048 pixels"),
        ({"width": -16}, "width: -16 is not between"),
        ({"sigmas": []}, "sigmas: 0 noise levels; expected 1 to 100"),
        ({"sigmas": [1.0] * 101}, "sigmas: 101 noise levels; expected 1 to 100"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "sigmas: 0.5 follows 0.5; noise levels must decrease"),
        ({"sigmas": [1.0, 0.0]}, "sigmas: 0 is not above 0 and at most 1"),
        ({"sigmas": [1.5]}, "sigmas: 1.5 is not above 0 and at most 1"),
        ({"sigmas": [float("nan")]}, "sigmas: nan is not above 0"),
        ({"sigmas": "fast"}, "sigmas: 'fast' is not a list of numbers"),
        ({"sigmas": 3}, "sigmas: 3 is not a list of numbers"),
        ({"sigmas": [1.0, 0.5], "steps": 4}, "steps: 4 is not the number of sigmas, 2; leave steps out"),
        ({"response_encoding": "hex"}, "response_encoding: 'hex' is not one of bytes, base64"),
        ({"steps": 0}, "steps: 0 is not between 1 and 100"),
        ({"steps": -4}, "steps: -4 is not between 1 and 100"),
        ({"steps": 101}, "steps: 101 is not between 1 and 100"),
        ({"num_images": 0}, "num_images: 0 is not between 1 and 4"),
        ({"seed": -1}, "seed: -1 is not between 0 and"),
        ({"guidance": float("nan")}, "guidance: nan is not between 0 and 20"),
        ({"guidance": float("inf")}, "guidance: inf is not between"),
        (
            {"guidance": 4.0},
            "guidance: 4 has no effect on klein-4b, which is distilled to run without it; leave it out or send 1.0",
        ),
        ({"prompt": ""}, "prompt: '' is empty; say what to generate"),
        ({"prompt": "  \n"}, r"prompt: '  \\n' is empty"),
        ({"prompt": b"\xff"}, "prompt: byte 0 is not valid UTF-8"),
        ({"prompt": 3}, "prompt: 3 is not text"),
        ({"negative_prompt": "fog"}, "negative_prompt: 'fog' has no effect on klein-4b"),
        ({"output_format": "gif"}, "output_format: 'gif' is not one of png, jpeg, webp"),
        ({"widht": 64}, "unknown field 'widht'; there are: prompt, negative_prompt"),
    ],
)
def test_an_invalid_value_is_named_with_its_rule(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check({"prompt": "a cat"} | fields, KLEIN, Limits())


def test_too_many_pixels_are_rejected_even_if_each_side_fits() -> None:
    with pytest.raises(RequestError, match="2048 x 2048 is 4194304 pixels; this server generates at most 1048576"):
        check({"prompt": "a", "width": 2048, "height": 2048}, KLEIN, Limits(max_pixels=1024 * 1024))


def test_a_base_variant_takes_a_negative_prompt() -> None:
    assert check({"prompt": "a", "negative_prompt": "fog"}, BASE, Limits()).negative_prompt == "fog"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_side": 100}, "--min-side 100: must be a positive multiple of 16"),
        ({"min_side": 4096}, "larger than --max-side"),
    ],
)
def test_contradictory_limits_are_rejected(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Limits(**limits)


def test_where_sizes_are_compiled_no_other_is_accepted_and_the_largest_is_the_default() -> None:
    limits = Limits(sizes=((512, 512), (768, 512), (128, 64)))
    made = check({"prompt": "x"}, VARIANTS["klein-4b"], limits)
    assert (made.width, made.height) == (768, 512), "1024 x 1024 was not compiled"
    assert limits.smallest == (128, 64)
    with pytest.raises(RequestError, match="width x height: 512 x 768 was not compiled; .* generates 512 x 512, 768 x"):
        check({"prompt": "x", "width": 512, "height": 768}, VARIANTS["klein-4b"], limits)
    made = check({"prompt": "x"}, VARIANTS["klein-4b"], Limits(sizes=((1024, 1024), (2048, 1024))))
    assert (made.width, made.height) == (1024, 1024)
    assert Limits().smallest == (Limits().min_side, Limits().min_side)
