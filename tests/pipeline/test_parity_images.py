"""Whole images against diffusers: same checkpoint, same prompt, same seed, a CPU generator."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kit.checkpoint import resolve
from kit.variants import Family
from pipeline.local import LocalPipeline
from tests.conftest import ByFamily

SIZES = [(64, 64), (96, 128), (128, 64)]  # width, height
STEPS: dict[Family, int] = {"klein": 4, "klein-base": 6, "dev": 6}
GUIDANCE: dict[Family, float] = {"klein": 1.0, "klein-base": 4.0, "dev": 2.5}
PIPELINES = {"dev": diffusers.Flux2Pipeline}


@cache
def reference(checkpoint: Path, family: Family) -> Any:
    pipe = PIPELINES.get(family, diffusers.Flux2KleinPipeline).from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def ours(artifact: Path) -> LocalPipeline:
    return LocalPipeline(artifact)


def generate_with_diffusers(pipe: Any, family: Family, prompt: str, seed: int, **size: int) -> np.ndarray[Any, Any]:
    images = pipe(
        prompt=prompt,
        num_inference_steps=STEPS[family],
        guidance_scale=GUIDANCE[family],
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        **size,
    ).images
    return np.asarray((images * 255).round(), dtype=np.uint8)


def assert_same_images(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> None:
    """Check that at least 99.9 % of the bytes are equal and none differs by more than 1."""
    assert ours.shape == theirs.shape
    off = np.abs(ours.astype(int) - theirs.astype(int))
    assert off.max() <= 1, f"max difference {off.max()} of 255, mean {off.mean():.5f}"
    assert (off == 0).mean() >= 0.999, f"{(off == 0).mean():.5%} of the bytes are equal"


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("family", STEPS)
def test_an_image_equals_that_of_diffusers(
    family: Family, width: int, height: int, images: int, checkpoint_of: ByFamily, artifact_of: ByFamily
) -> None:
    prompt = f"a red fox number {images}, 35mm photo"
    fields = {"steps": STEPS[family], "guidance": GUIDANCE[family], "width": width, "height": height}
    generated = ours(artifact_of(family)).generate(fields | {"prompt": prompt, "seed": 11, "num_images": images})
    pipe = reference(checkpoint_of(family), family)
    theirs = generate_with_diffusers(pipe, family, prompt, 11, width=width, height=height, num_images_per_prompt=images)
    assert_same_images(generated.pixels, theirs)


@pytest.mark.parametrize("family", STEPS)
def test_images_from_shared_batches_equal_those_of_diffusers(
    family: Family, checkpoint_of: ByFamily, artifact_of: ByFamily
) -> None:
    fields = {"steps": STEPS[family], "guidance": GUIDANCE[family]}
    requests: list[dict[str, Any]] = [
        fields | {"prompt": f"number {n}", "seed": n, "width": width, "height": height}
        for n, (width, height) in enumerate([*SIZES, SIZES[0]])
    ]
    pipe = reference(checkpoint_of(family), family)
    for request, generated in zip(requests, ours(artifact_of(family)).generate_batch(requests), strict=True):
        size = {"width": request["width"], "height": request["height"]}
        theirs = generate_with_diffusers(pipe, family, request["prompt"], request["seed"], **size)
        assert_same_images(generated.pixels, theirs)


@pytest.mark.parametrize("family", STEPS)
def test_the_prompt_changes_the_image(family: Family, artifact_of: ByFamily) -> None:
    """Otherwise the comparisons above could not detect a broken text encoder."""
    fields = {"steps": STEPS[family], "guidance": GUIDANCE[family], "width": 64, "height": 64, "seed": 1}
    one, other = (ours(artifact_of(family)).generate(fields | {"prompt": p}).pixels for p in ("a cat", "two dogs"))
    assert np.abs(one.astype(int) - other.astype(int)).mean() > 1


def test_a_negative_prompt_steers_a_base_variant(artifact_of: ByFamily) -> None:
    fields = {"prompt": "a cat", "steps": 4, "guidance": 4.0, "width": 64, "height": 64, "seed": 1}
    plain, steered = (
        ours(artifact_of("klein-base")).generate(fields | {"negative_prompt": n}).pixels for n in ("", "blue sky")
    )
    assert np.abs(plain.astype(int) - steered.astype(int)).mean() > 1


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(128, 128), *SIZES])
def test_the_sample_gives_the_same_images_in_diffusers(
    width: int, height: int, images: int, sample_artifact: Path
) -> None:
    prompt = "a red circle left of a blue square on a white background, with the word HELLO"
    fields = {"prompt": prompt, "seed": 3, "steps": 4, "width": width, "height": height, "num_images": images}
    pipeline = ours(sample_artifact)
    theirs = generate_with_diffusers(
        reference(resolve("sample"), "klein"),
        "klein",
        prompt,
        3,
        width=width,
        height=height,
        num_images_per_prompt=images,
        max_sequence_length=pipeline.variant.text_tokens,
    )
    assert_same_images(pipeline.generate(fields).pixels, theirs)
