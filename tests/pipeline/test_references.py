"""References, start images and masks are prepared byte by byte as diffusers' pipelines prepare them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline
from PIL import Image

from kit.errors import RequestError
from pipeline.inpainting import Inpainting, prepare_image, prepare_mask, steps_skipped
from pipeline.position_ids import reference_ids
from pipeline.references import check_size, limited_size, pack, prepare, whole_tokens

SIZES = [(64, 64), (100, 77), (95, 640), (1024, 1024), (1025, 1024), (1600, 1200), (3001, 1777), (1400, 749)]
PROCESSOR = Flux2ImageProcessor(vae_scale_factor=16, vae_latent_channels=32)
MASKS = Flux2ImageProcessor(
    vae_scale_factor=16,
    vae_latent_channels=32,
    do_normalize=False,
    do_binarize=True,
    do_convert_rgb=False,
    do_convert_grayscale=True,
)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_reference_has_the_pixels_of_diffusers(width: int, height: int) -> None:
    image = theirs = PROCESSOR.check_image_input(picture(width, height))
    if width * height > 1024 * 1024:
        theirs = PROCESSOR._resize_to_target_area(theirs, 1024 * 1024)
    kept = [side // 16 * 16 for side in theirs.size]
    expected = PROCESSOR.preprocess(theirs, height=kept[1], width=kept[0], resize_mode="crop")
    assert np.array_equal(prepare(image), expected[0].numpy())
    assert whole_tokens(width, height) == tuple(kept)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_start_image_and_its_mask_have_the_values_of_diffusers(width: int, height: int) -> None:
    image, mask = picture(width, height), picture(width, height)
    theirs = image
    limited = limited_size(width, height)
    if limited != (width, height):
        theirs = PROCESSOR.resize(theirs, limited[1], limited[0])
    columns, rows = whole_tokens(width, height)
    expected = PROCESSOR.preprocess(theirs, rows, columns, resize_mode="default")
    assert np.array_equal(prepare_image(image), expected[0].numpy())
    pipe: Any = Flux2KleinInpaintPipeline.__new__(Flux2KleinInpaintPipeline)
    pipe.__dict__["vae_scale_factor"] = 8
    condition = MASKS.preprocess(mask, height=rows, width=columns, resize_mode="default")
    packed = pipe.prepare_mask_latents(condition, 1, 1, rows, columns, torch.float32, "cpu")
    assert np.array_equal(prepare_mask(mask, columns, rows), packed[0].numpy())


def test_a_mask_without_white_is_refused() -> None:
    with pytest.raises(RequestError, match="mask: it has no white pixels, so nothing would be repainted"):
        prepare_mask(Image.new("RGB", (64, 64)), 64, 64)


@pytest.mark.parametrize("theirs", [Flux2Pipeline, Flux2KleinPipeline])
def test_position_ids_and_order_are_those_of_diffusers(theirs: Any) -> None:
    grids = [(4, 6), (3, 3), (4, 6)]
    latents = [torch.randn(1, 128, *grid) for grid in grids]
    ours = pack([x[0].numpy() for x in latents])
    assert np.array_equal(ours.ids, theirs._prepare_image_ids(latents)[0].numpy())
    assert np.array_equal(ours.ids, reference_ids(grids))
    assert np.array_equal(ours.latents, torch.cat([theirs._pack_latents(x)[0] for x in latents]).numpy())


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (63, 640, "images\\[0\\]: 63 x 640 pixels; each side must have at least 64"),
        (64, 513, "images\\[0\\]: 64 x 513 pixels; the longer side may be 8 times the shorter"),
    ],
)
def test_sizes_that_diffusers_refuses_are_refused(width: int, height: int, message: str) -> None:
    with pytest.raises(ValueError, match="Image too small|Aspect ratio too extreme"):
        PROCESSOR.check_image_input(picture(width, height))
    with pytest.raises(RequestError, match=message):
        check_size(width, height, "images[0]")


@pytest.mark.parametrize(("steps", "strength", "skipped"), [(4, 0.8, 0), (4, 0.75, 1), (50, 0.3, 35), (4, 1.0, 0)])
def test_strength_is_the_share_of_the_steps_that_runs(steps: int, strength: float, skipped: int) -> None:
    assert steps_skipped(steps, strength) == skipped


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_noise_and_mask_are_applied_in_the_compute_type(compute: Any) -> None:
    dtype = torch.float32 if compute == "fp32" else torch.bfloat16
    image, noise, latents = (torch.randn(2, 6, 128).to(dtype) for _ in range(3))
    mask = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1])[:, None].to(dtype)
    sigma = torch.tensor(0.7313, dtype=torch.float32).to(dtype)
    noised = sigma * noise + (1.0 - sigma) * image[:1]
    blended = (1 - mask) * noised + mask * latents
    ours = Inpainting(image[0].float().numpy(), mask.float().numpy(), compute)
    assert np.array_equal(ours.noised(noise.float().numpy(), np.float32(0.7313)), noised.float().numpy())
    found = ours.blend(latents.float().numpy(), noise.float().numpy(), np.float32(0.7313))
    assert np.array_equal(found, blended.float().numpy())
