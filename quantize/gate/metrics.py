"""What the gate can report: each metric's name, which way is better, and what one wrong answer is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number of a pair of images.

    `grain` is what one wrong answer moves in a metric that counts answers; 0 for one that measures. `digits` are those
    shown behind the point.
    """

    name: str
    better: Literal["higher", "lower"]
    about: str
    grain: float = 0.0
    digits: int = 4


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr", "higher", "peak signal-to-noise ratio in dB, 100 for equal images", digits=2),
        Metric("ssim", "higher", "structural similarity, Gaussian window of 11 pixels"),
        Metric("flip", "lower", "NVIDIA FLIP, mean visible difference from 0 to 1 at 67 pixels per degree"),
        Metric("latent_cosine", "higher", "cosine of the latents, least over the steps", digits=6),
        Metric("lpips", "lower", "LPIPS 0.1 with AlexNet"),
        Metric("clip_change", "higher", "CLIP score of image and prompt, 0 to 100, minus the reference's", digits=2),
        # the share of characters moves by a whole text when none of it can be read any more
        Metric("text_change", "higher", "share of the asked text's characters read back, minus the reference's", 1.0),
        Metric("text_exact_change", "higher", "share of asked texts read back whole, minus the reference's", 1.0),
        # a scene of one thing has seven facts to get right
        Metric("judge_change", "higher", "share of a scene's facts that the judge sees, minus the reference's", 1 / 7),
        Metric("judge_exact_change", "higher", "share of scenes without any fault, minus the reference's", 1.0),
    )
}


@dataclass(frozen=True)
class Score:
    """One metric of one pair; `levels` are the reference's and the candidate's where the metric is their difference."""

    value: float
    levels: tuple[float, float] | None = None

    @classmethod
    def change(cls, reference: float, candidate: float) -> Score:
        """Score a difference of two levels."""
        return cls(candidate - reference, (reference, candidate))
