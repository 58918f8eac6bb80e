"""A checked request as tensors and back, without a server."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from kit.variants import VARIANTS
from pipeline.request import FORMATS, ImageFormat, Limits, Request, check
from serve.wire import DENOISED, FORMAT, IMAGE_ENCODED, NUMPY, SEED, TENSORS, request_from_tensors, request_to_tensors

REQUEST = Request(
    prompt="a cat",
    negative_prompt="fog",
    seed=2**63 - 1,
    width=96,
    height=128,
    steps=28,
    guidance=2.5,
    num_images=3,
    output_format="webp",
)


BROUGHT = ("prompt", "negative_prompt", "images", "mask")  # as embeddings, latents and mask of tokens


def test_every_field_is_in_one_tensor_or_brought_to_the_denoiser() -> None:
    packed = [field for tensor in TENSORS for field in tensor.fields]
    assert sorted([*packed, *BROUGHT]) == sorted(field.name for field in fields(Request))


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_request_survives_the_round_trip_without_its_prompts(output_format: ImageFormat) -> None:
    request = replace(REQUEST, output_format=output_format)
    assert request_from_tensors(request_to_tensors(request)) == replace(request, prompt="", negative_prompt="")


@pytest.mark.parametrize("name", VARIANTS)
def test_defaults_survive_the_round_trip(name: str) -> None:
    request = check({"prompt": "a cat", "seed": 0}, VARIANTS[name], Limits())
    assert request_from_tensors(request_to_tensors(request)) == replace(request, prompt="")


def test_sigmas_survive_the_round_trip() -> None:
    for sigmas in ((), (1.0, 0.5, 0.25), (0.125,)):
        request = replace(REQUEST, sigmas=sigmas, response_encoding="base64")
        found = request_from_tensors(request_to_tensors(request))
        assert (found.sigmas, found.response_encoding) == (sigmas, "base64")


def test_a_strength_survives_the_round_trip_as_the_number_that_was_sent() -> None:
    for strength in (0.8, 0.1, 0.333, 1.0):
        assert request_from_tensors(request_to_tensors(replace(REQUEST, strength=strength))).strength == strength


def test_the_denoiser_rebuilds_the_request_without_its_format() -> None:
    tensors = request_to_tensors(REQUEST)
    rebuilt = request_from_tensors({tensor.name: tensors[tensor.name] for tensor in DENOISED})
    assert rebuilt == replace(REQUEST, prompt="", negative_prompt="", output_format="png")


def test_the_image_encoder_reads_format_encoding_and_seed() -> None:
    tensors = request_to_tensors(REQUEST)
    found = [tensor.unpack(tensors[tensor.name]) for tensor in IMAGE_ENCODED]
    assert found == [{"output_format": "webp"}, {"response_encoding": "bytes"}, {"seed": 2**63 - 1}]


def test_tensors_have_the_types_and_shapes_of_the_table() -> None:
    for name, array in request_to_tensors(REQUEST).items():
        (tensor,) = (entry for entry in TENSORS if entry.name == name)
        assert array.dtype == np.dtype(NUMPY[tensor.type])
        dims = (1,) if tensor.many else tensor.dims
        assert array.shape == ((1, *dims) if tensor.batched else dims)
    assert request_to_tensors(REQUEST)["checked_size"].tolist() == [[96, 128]]
    assert (SEED.batched, FORMAT.batched) == (True, False)
