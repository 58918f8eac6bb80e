"""Fit the planner's calibration to the public points that are not held out.

Eleven numbers are found by pattern search on the sum of |log(predicted / measured)|, with equal weight for each source,
so that one unusual source has limited influence. There is no random start, so the result is the same on every machine.
The range of a plan comes from fits that leave out one source each: how far its points are from their predictions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles

from kit.gpus import Generation
from planner.measurements import Measurement
from planner.speed import Calibration, passes_of, predict, predict_passes

# Start of the search; START and BOUNDS are known without measurements.
START = {
    "share": 0.9,
    "ampere": 1.6,
    "ada": 1.6,
    "hopper": 1.2,
    "blackwell": 0.9,
    "eight_bits": 0.6,
    "attention": 1.5,
    "eager": 100.0,
    "fused": 25.0,
    "tensorrt": 1.1,
    "outside": 0.05,
}
# Physical limits: at most the dense rate; attention is never cheaper than a linear layer and, at half to three
# quarters of the peak (FlashAttention-2 on A100, -3 on H100), costs at most twice as much.
BOUNDS = {"share": (0.5, 1.0), "eight_bits": (0.3, 1.0), "attention": (1.0, 2.0), "tensorrt": (0.8, 1.5)}
GENERATIONS: tuple[Generation, ...] = ("ampere", "ada", "hopper", "blackwell")


def fit(points: Sequence[Measurement]) -> Calibration:
    """Fit to the points, including the range."""
    low, *_, high = quantiles(spread(points), n=10, method="inclusive")
    return _calibration(_search(points), low, high)


def fit_centre(points: Sequence[Measurement]) -> Calibration:
    """Fit to the points without the range, which takes one fit per source."""
    return _calibration(_search(points), 1.0, 1.0)


def spread(points: Sequence[Measurement]) -> list[float]:
    """Return measured / predicted for every point whose cell has other sources, predicted without its own source."""
    ratios = []
    for source in sorted({p.source for p in points}):
        rest = [p for p in points if p.source != source]
        known = {p.cell for p in rest}
        left_out = [p for p in points if p.source == source and p.cell in known and p.stack != "tensorrt"]
        if left_out:
            model = fit_centre(rest)
            ratios += [p.seconds / predict(p, model) for p in left_out]
    return ratios


def _search(points: Sequence[Measurement]) -> dict[str, float]:
    prepared = [(passes_of(p), p) for p in points]
    per_source = Counter(p.source for p in points)
    weights = [1 / per_source[p.source] for p in points]

    def loss(values: dict[str, float]) -> float:
        model = _calibration(values, 1.0, 1.0)
        return sum(
            weight * abs(math.log(predict_passes(point, passes, model) / point.seconds))
            for weight, (passes, point) in zip(weights, prepared, strict=True)
        ) / sum(weights)

    return _pattern_search(loss, dict(START))


def write(found: Calibration, path: Path, facts: dict[str, object]) -> None:
    """Write the calibration that ships with the kit."""
    path.write_text(json.dumps({**facts, "calibration": asdict(found)}, indent=1) + "\n")


def _calibration(values: dict[str, float], low: float, high: float) -> Calibration:
    return Calibration(
        share=round(values["share"], 4),
        picojoules={name: round(values[name], 4) for name in GENERATIONS},
        eight_bits=round(values["eight_bits"], 4),
        attention=round(values["attention"], 4),
        passes={
            "eager": round(values["eager"], 2),
            "fused": round(values["fused"], 2),
            "tensorrt": round(values["fused"], 2),
        },
        tensorrt=round(values["tensorrt"], 4),
        outside=round(values["outside"], 4),
        low=round(low, 4),
        high=round(high, 4),
    )


def _pattern_search(loss: Callable[[dict[str, float]], float], values: dict[str, float]) -> dict[str, float]:
    """Change one number, then pairs of numbers, by a shrinking factor as long as the loss decreases."""
    best, names = loss(values), list(values)
    moves = [{n: s} for n in names for s in (1, -1)]
    moves += [{a: s, b: t} for i, a in enumerate(names) for b in names[i + 1 :] for s in (1, -1) for t in (1, -1)]
    factor = 1.3
    while factor > 1.001:
        moved = False
        for move in moves:
            trial = values | {name: _bounded(name, values[name] * factor**sign) for name, sign in move.items()}
            if (value := loss(trial)) < best - 1e-9:
                best, values, moved = value, trial, True
        if not moved:
            factor = factor**0.5
    return values


def _bounded(name: str, value: float) -> float:
    low, high = BOUNDS.get(name, (1e-3, 1e4))
    return min(max(value, low), high)
