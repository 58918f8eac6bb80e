"""Check the predicted order: quantize some groups alone and compare their measured ranks with the predicted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.search.groups import Key
from quantize.search.ladder import Problem


@dataclass(frozen=True)
class Alone:
    """Predicted and measured errors with one group quantized and all others spared."""

    key: Key
    predicted: float  # relative squared error of the final latents
    local: float  # relative squared error of the group's own outputs
    latents: float  # measured relative squared error of the final latents
    images: float  # measured mean squared error of images from 0 to 1


def pick(problem: Problem, count: int) -> list[Key]:
    """Choose groups evenly over the ranking, including the most and the least sensitive one."""
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
    """Return Spearman's rank correlation; None if it is undefined, for fewer than three or for equal values."""
    if len(ours) < 3 or len(set(ours)) == 1 or len(set(theirs)) == 1:
        return None
    from scipy import stats

    return float(stats.spearmanr(ours, theirs).statistic)


def squared_error(psnr: float) -> float:
    """Return the mean squared error, of an image from 0 to 1, that corresponds to a PSNR in dB."""
    return float(10 ** (-psnr / 10))
