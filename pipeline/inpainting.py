"""Inpainting as Flux2KleinInpaintPipeline defines it: repaint where a mask is white, keep the rest at every step.

The image is the start of the denoising loop as well as the first reference. `strength` says which share of the steps
runs; after each step the tokens that the mask keeps are set back to the image with the noise of the next level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from kit.dtypes import Compute, numpy_type
from kit.errors import RequestError
from kit.image_size import PIXELS_PER_TOKEN
from pipeline.references import limited_size, to_range, whole_tokens

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Inpainting:
    """What a request repaints: packed latents of the image [S, 128], and the mask [S, 1], 1 = repaint."""

    image: Float32
    mask: Float32
    compute: Compute

    def noised(self, noise: Float32, level: np.float32) -> Float32:
        """Return the image's latents at a noise level, [N, S, 128]."""
        sigma = self._round(level)
        return self._round(self._round(sigma * noise) + self._round(self._round(1 - sigma) * self.image))

    def blend(self, latents: Float32, noise: Float32, level: np.float32) -> Float32:
        """Put the image back where the mask keeps it; `level` is the noise level of `latents` [N, S, 128]."""
        kept = self._round((1 - self.mask) * self.noised(noise, level))
        return self._round(kept + self._round(self.mask * latents))

    def _round(self, values: Float32 | np.float32) -> Float32:
        """Round to the compute type, in which diffusers computes here."""
        return np.asarray(values).astype(numpy_type(self.compute)).astype(np.float32)


def steps_skipped(steps: int, strength: float) -> int:
    """Return how many of the steps do not run: all from the start of the schedule."""
    return int(max(steps - min(steps * strength, steps), 0))


def prepare_image(image: Image.Image) -> Float32:
    """Scale an RGB image to whole tokens within the area limit: [3, H, W] in -1 to 1.

    Unlike references it is not cropped, so the mask fits; diffusers scales twice when the area limit applies.
    """
    limited, size = limited_size(*image.size), whole_tokens(*image.size)
    if limited != image.size:
        image = image.resize(limited, Image.Resampling.LANCZOS)
    return to_range(image.resize(size, Image.Resampling.LANCZOS))


def prepare_mask(mask: Image.Image, width: int, height: int) -> Float32:
    """Reduce an RGB mask to the tokens of an image of `width` x `height` pixels: [S, 1], 0 to 1.

    The mask becomes black and white at the size of the image, then each token takes what lies at its centre: the mean
    of four pixels, as bilinear interpolation by a factor of 16 reads it.
    """
    grey = mask.resize((width, height), Image.Resampling.LANCZOS).convert("L")
    white = (np.asarray(grey).astype(np.float32) / np.float32(255) >= 0.5).astype(np.float32)
    if not white.any():
        raise RequestError("mask: it has no white pixels, so nothing would be repainted")
    step, middle = PIXELS_PER_TOKEN, PIXELS_PER_TOKEN // 2
    rows = white[middle - 1 :: step] + white[middle::step]  # [h, W]
    means: Float32 = (rows[:, middle - 1 :: step] + rows[:, middle::step]) / np.float32(4)  # [h, w]
    return means.reshape(-1, 1)
