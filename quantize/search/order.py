"""Is the predicted order right: some groups quantized alone, drawn, and their ranks compared with the prediction's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.search.groups import Key
from quantize.search.ladder import Problem


@dataclass(frozen=True)
class Alone:
    """One group quantized and all others spared: what was predicted, and the error of the images."""

    key: Key
    predicted: float  # relative squared error of the final latents
    local: float  # relative squared error of the group's own outputs
    latents: float  # what was predicted, measured
    images: float  # measured, the mean squared error of images from 0 to 1


def pick(problem: Problem, count: int) -> list[Key]:
    """Choose groups evenly over the ranking, the most and the least sensitive among them."""
    ranked = sorted(
        (key for key, group in problem.groups.items() if group.cost(problem.cost) > 0),
        key=lambda key: problem.effects[key, "quantized"],
        reverse=True,
    )
    if count >= len(ranked):
        return ranked
    return [ranked[round(turn * (len(ranked) - 1) / max(1, count - 1))] for turn in range(count)]


def others(problem: Problem, key: Key) -> frozenset[Key]:
    """Return all groups but one."""
    return frozenset(problem.groups) - {key}


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None where fewer than three or equal values give none."""
    if len(ours) < 3 or len(set(ours)) == 1 or len(set(theirs)) == 1:
        return None
    from scipy import stats

    return float(stats.spearmanr(ours, theirs).statistic)


def squared_error(psnr: float) -> float:
    """Return the mean squared error, of an image from 0 to 1, that a PSNR in dB stands for."""
    return float(10 ** (-psnr / 10))
