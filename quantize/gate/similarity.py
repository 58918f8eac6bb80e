"""Measure the similarity of two images of one prompt and seed: PSNR, SSIM, FLIP and the cosine of the latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
MOST_DB = 100.0  # of equal images, whose ratio is infinite; the smallest difference at 128 x 128 pixels gives 95 dB


def psnr(reference: Pixels, candidate: Pixels) -> float:
    """Return 10 log10(255^2 / mean squared error) in dB, at most MOST_DB."""
    error = float(np.mean((reference.astype(np.float64) - candidate.astype(np.float64)) ** 2))
    return MOST_DB if error == 0 else min(MOST_DB, 10 * float(np.log10(255.0**2 / error)))


def ssim(reference: Pixels, candidate: Pixels) -> float:
    """Return the mean structural similarity over the colour channels, with the settings of Wang et al. (2004)."""
    import skimage.metrics

    compare: Any = skimage.metrics.structural_similarity
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(compare(reference, candidate, channel_axis=2, data_range=255, **settings))


def flip(reference: Pixels, candidate: Pixels) -> float:
    """Return NVIDIA FLIP's mean (Andersson et al. 2020) as seen at 67 pixels per degree of visual angle."""
    import flip_evaluator

    _, mean, _ = flip_evaluator.evaluate(_unit(reference), _unit(candidate), "LDR", applyMagma=False)
    return float(mean)


def colour_shift(reference: Pixels, candidate: Pixels) -> float:
    """Return the largest absolute change of a channel's mean, in per cent of 255; noise averages out in it."""
    change = candidate.astype(np.float64).mean(axis=(0, 1)) - reference.astype(np.float64).mean(axis=(0, 1))
    return float(np.abs(change).max() / 255 * 100)


def flip_map(reference: Pixels, candidate: Pixels) -> Pixels:
    """Return a map of FLIP per pixel: from black (no visible difference) over violet and orange to pale yellow (1)."""
    import flip_evaluator

    coloured, _, _ = flip_evaluator.evaluate(_unit(reference), _unit(candidate), "LDR", computeMeanError=False)
    return np.asarray((np.asarray(coloured) * 255).round(), dtype=np.uint8)


def cosines(reference: npt.NDArray[np.generic], candidate: npt.NDArray[np.generic]) -> list[float]:
    """Return the cosine of two trajectories [steps, values] at every step."""
    ours, theirs = candidate.astype(np.float64), reference.astype(np.float64)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return [float(value) for value in (ours * theirs).sum(axis=1) / lengths]


def latent_snr(reference: npt.NDArray[np.generic], candidate: npt.NDArray[np.generic]) -> float:
    """Return 20 log10(|reference| / |difference|) of the latents after the first step, in dB, at most MOST_DB.

    Later steps amplify every difference alike, whatever its cause, so the first one separates small faults best.
    Latents in half precision limit it to about 70 dB.
    """
    theirs, ours = reference[0].astype(np.float64), candidate[0].astype(np.float64)
    noise = float(np.linalg.norm(ours - theirs))
    return MOST_DB if noise == 0 else min(MOST_DB, 20 * float(np.log10(np.linalg.norm(theirs) / noise)))


def _unit(image: Pixels) -> npt.NDArray[np.float32]:
    return image.astype(np.float32) / 255
