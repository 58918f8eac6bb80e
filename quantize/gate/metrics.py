"""The metrics of the gate: name, direction, meaning, and the weight of one wrong answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number for a pair of images.

    `grain` is what one wrong answer moves in a metric that counts answers, and 0 for other metrics. `digits` is the
    number of decimals shown.
    """

    name: str
    better: Literal["higher", "lower"]
    about: str
    grain: float = 0.0
    digits: int = 4


LATENT = ("latent_cosine", "latent_snr")  # what a server, which returns images only, does not give
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr", "higher", "peak signal-to-noise ratio in dB, 100 for equal images", digits=2),
        Metric("ssim", "higher", "structural similarity, Gaussian window of 11 pixels"),
        Metric("flip", "lower", "NVIDIA FLIP, mean visible difference from 0 to 1 at 67 pixels per degree"),
        Metric("colour", "lower", "largest change of a colour channel's mean, in % of its range", digits=3),
        Metric("latent_cosine", "higher", "cosine of the latents, the smallest of all steps", digits=6),
        Metric("latent_snr", "higher", "signal-to-noise ratio of the latents after the first step in dB", digits=2),
        Metric("lpips", "lower", "LPIPS 0.1 with AlexNet"),
        Metric("clip_change", "higher", "CLIP score of image and prompt, 0 to 100, minus the reference's", digits=2),
        # one text that becomes unreadable moves the share of its characters by 1
        Metric(
            "text_change",
            "higher",
            "share of the requested text's characters read back (1 - edit distance / length), minus the reference's",
            1.0,
        ),
        Metric("text_exact_change", "higher", "share of requested texts read back whole, minus the reference's", 1.0),
        # a scene with one object has seven facts
        Metric("judge_change", "higher", "share of a scene's facts that the judge finds, minus the reference's", 1 / 7),
        Metric("judge_exact_change", "higher", "share of scenes without a fault, minus the reference's", 1.0),
    )
}


@dataclass(frozen=True)
class Score:
    """One metric of one pair; `levels` are the values of reference and candidate if the metric is a difference."""

    value: float
    levels: tuple[float, float] | None = None

    @classmethod
    def change(cls, reference: float, candidate: float) -> Score:
        """Return the score of a metric that is a difference of two levels."""
        return cls(candidate - reference, (reference, candidate))
