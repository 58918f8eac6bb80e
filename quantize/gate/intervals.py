"""Confidence intervals of a mean over prompts and seeds.

The seeds of one prompt are correlated, so prompts are resampled and the seeds of each stay together: a cluster
bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997, 3.8; Field and Welsh 2007). Both
artifacts use the same prompts and seeds, and their difference is resampled: the intervals are paired. The ends are
bias-corrected and accelerated (BCa, Efron 1987).

Metrics that count answers change rarely, and a bootstrap cannot resample what did not occur: if none of n prompts lost,
it would rule out any loss. In that case the rule of three applies (Hanley and Lippman-Hand 1983): up to 3/n of all
prompts may lose, each by the metric's grain, and the low end is lowered by that. The same goes for the high end if no
prompt gained.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % confidence interval, and the number of prompts and drawings behind it."""

    mean: float
    low: float
    high: float
    prompts: int
    drawings: int


def interval(
    values: Sequence[Sequence[float]], grain: float = 0.0, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Estimate the mean of `values` [prompts][seeds]; every prompt has the same number of seeds.

    `grain` is what one answer moves in a metric that counts answers, and 0 for other metrics.
    """
    means = np.array(values, np.float64).mean(axis=1)  # [prompts]
    mean, drawings = float(means.mean()), sum(len(of_prompt) for of_prompt in values)
    low = high = mean
    if float(np.ptp(means)) > 0:
        low, high = _bootstrap(means, resamples, seed, "BCa")
        if not np.isfinite([low, high]).all():  # nearly all values are equal: the acceleration is undefined
            low, high = _bootstrap(means, resamples, seed, "percentile")
    unseen = 3 * grain / len(means)
    if unseen and means.min() >= 0:
        low = min(low, mean - unseen)
    if unseen and means.max() <= 0:
        high = max(high, mean + unseen)
    return Interval(mean, low, high, len(means), drawings)


def _bootstrap(means: npt.NDArray[np.float64], resamples: int, seed: int, method: str) -> tuple[float, float]:
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns when it returns NaN, which the caller checks
        found = stats.bootstrap(
            (means,),
            np.mean,
            n_resamples=resamples,
            batch=1000,  # bounds the memory of many prompts
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)
