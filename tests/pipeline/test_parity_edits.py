"""Edited images against diffusers: references, guidance, cached references and inpainting, on tiny checkpoints."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from kit.errors import RequestError
from kit.variants import Family
from pipeline.local import LocalPipeline
from tests.conftest import ByFamily
from tests.pipeline.test_parity_images import assert_same_images

STEPS: dict[Family, int] = {"klein": 4, "klein-base": 5, "klein-kv": 4, "dev": 5}
GUIDANCE: dict[Family, float] = {"klein": 1.0, "klein-base": 4.0, "klein-kv": 1.0, "dev": 2.5}
PIPELINES: dict[Family, Any] = {
    "klein": diffusers.Flux2KleinPipeline,
    "klein-base": diffusers.Flux2KleinPipeline,
    "klein-kv": diffusers.Flux2KleinKVPipeline,
    "dev": diffusers.Flux2Pipeline,
}
REFERENCES = [(64, 96), (101, 70), (128, 64)]  # width, height; one is cropped to whole tokens


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return smooth colours, which a VAE encodes to more than noise."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def half_mask(width: int, height: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2 + 5, : width // 3] = 255
    return Image.fromarray(mask)


@cache
def reference(checkpoint: Path, kind: Any) -> Any:
    pipe = kind.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def ours(artifact: Path) -> LocalPipeline:
    return LocalPipeline(artifact)


def run(pipe: Any, seed: int, family: Family, **options: Any) -> np.ndarray[Any, Any]:
    if family != "klein-kv":
        options["guidance_scale"] = GUIDANCE[family]
    generator = torch.Generator("cpu").manual_seed(seed)
    images = pipe(num_inference_steps=STEPS[family], generator=generator, output_type="np", **options).images
    return np.asarray((images * 255).round(), dtype=np.uint8)


def fields_of(family: Family, images: list[Image.Image], **more: Any) -> dict[str, Any]:
    known = {"prompt": "make it blue", "steps": STEPS[family], "guidance": GUIDANCE[family], "seed": 5}
    return known | {"images": [png(image) for image in images]} | more


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("family", STEPS)
def test_an_edit_equals_that_of_diffusers(
    family: Family, count: int, checkpoint_of: ByFamily, artifact_of: ByFamily
) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(REFERENCES[:count])]
    fields = fields_of(family, images, num_images=count if count < 3 else 1)
    generated = ours(artifact_of(family)).generate(fields)
    pipe = reference(checkpoint_of(family), PIPELINES[family])
    options = {"prompt": fields["prompt"], "image": images, "num_images_per_prompt": fields["num_images"]}
    assert_same_images(generated.pixels, run(pipe, 5, family, **options))  # the size is that of the first reference


@pytest.mark.parametrize("family", STEPS)
def test_a_mixed_batch_gives_every_request_its_own_bits(family: Family, artifact_of: ByFamily) -> None:
    """Two requests have references of one size, two have none, and one has as many tokens in other places."""
    size = {"width": 64, "height": 96}
    requests = [
        fields_of(family, [picture(64, 96, 1)], **size),
        fields_of(family, [picture(64, 96, 2)], **size),
        fields_of(family, [], **size),
        fields_of(family, [picture(96, 64, 3), picture(64, 64, 4)], **size),
        fields_of(family, [], width=64, height=192),
    ]
    pipeline = ours(artifact_of(family))
    together = pipeline.generate_batch(requests)
    for fields, mixed in zip(requests, together, strict=True):
        assert np.array_equal(pipeline.generate(fields).pixels, mixed.pixels)
    assert not np.array_equal(together[0].pixels, together[1].pixels)


@pytest.mark.parametrize("family", STEPS)
def test_the_order_of_references_matters(family: Family, artifact_of: ByFamily) -> None:
    images = [picture(64, 64, 1), picture(64, 64, 2)]
    pipeline = ours(artifact_of(family))
    one, other = (pipeline.generate(fields_of(family, order)).pixels for order in (images, images[::-1]))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (101, 70)])
@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize("family", ["klein", "klein-base"])
def test_inpainting_equals_that_of_diffusers(
    family: Family, references: int, strength: float, width: int, height: int, checkpoint_of: ByFamily,
    artifact_of: ByFamily,
) -> None:  # fmt: skip
    image, mask, extra = picture(width, height), half_mask(width, height), picture(64, 80, 9)
    images = [image, extra][: 1 + references]
    fields = fields_of(family, images, mask=png(mask), strength=strength, num_images=2)
    generated = ours(artifact_of(family)).generate(fields)
    pipe = reference(checkpoint_of(family), diffusers.Flux2KleinInpaintPipeline)
    options = {"prompt": fields["prompt"], "image": image, "mask_image": mask, "strength": strength}
    if references:
        options["image_reference"] = extra
    assert_same_images(generated.pixels, run(pipe, 5, family, num_images_per_prompt=2, **options))


def test_an_artifact_without_vae_encoder_takes_no_references(checkpoint_of: ByFamily, tmp_path: Path) -> None:
    from export.artifact import ExportConfig, export
    from kit.ports import SERVED_PARTS

    export(checkpoint_of("klein"), tmp_path / "plain", ExportConfig(parts=SERVED_PARTS))
    with pytest.raises(RequestError, match="images: this artifact has no vae_encoder, so it takes no references"):
        LocalPipeline(tmp_path / "plain").generate(fields_of("klein", [picture(64, 64)]))
