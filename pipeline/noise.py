"""The seeded noise that denoising starts from, number by number as diffusers draws it with a CPU generator."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kit.dtypes import Compute, torch_type
from kit.variants import Variant


def initial_latents(
    variant: Variant, seed: int, images: int, width: int, height: int, compute: Compute
) -> npt.NDArray[np.float32]:
    """Draw packed latents [images, tokens, channels] in the order of `Flux2Pipeline.prepare_latents`.

    Like diffusers, noise is drawn in the compute type (bf16 and fp32 give different numbers for the same seed), with
    shape [images, channels, h, w], then packed row by row and returned as float32.
    """
    dtype = torch_type(compute)
    rows, columns = height // variant.pixels_per_token, width // variant.pixels_per_token
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (images, variant.transformer.channels, rows, columns)
    noise = torch.randn(shape, generator=generator, dtype=dtype).float()
    packed: npt.NDArray[np.float32] = noise.flatten(2).transpose(1, 2).contiguous().numpy()
    return packed
