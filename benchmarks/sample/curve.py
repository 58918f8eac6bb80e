"""Plot the losses of all stages in one small image, using only Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

PANEL, MARGIN, TALL = 300, 46, 220
LINE, SMOOTH, GRID = (195, 205, 235), (30, 60, 180), (225, 225, 225)


def smoothed(losses: Sequence[float], keep: float = 0.95) -> list[float]:
    """Return the moving average of a series, unbiased at its start."""
    mean, weight, out = 0.0, 0.0, []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def write_curve(series: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write one panel per stage: steps on the x axis, loss on a logarithmic y axis."""
    image = Image.new("RGB", (PANEL * len(series), TALL), "white")
    for index, (name, losses) in enumerate(series.items()):
        _panel(ImageDraw.Draw(image), index * PANEL, name, losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(32).save(path, optimize=True)


def _panel(pen: ImageDraw.ImageDraw, corner: int, name: str, losses: Sequence[float]) -> None:
    left, right, top, bottom = corner + MARGIN, corner + PANEL - 10, 24, TALL - 24
    logs = [math.log10(max(loss, 1e-9)) for loss in losses]
    low = min(logs)
    high = max(*logs, low + 0.1)

    def at(step: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / max(1, len(losses) - 1)
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = at(0, value)[1]
        pen.line((left, y, right, y), fill=GRID)
        pen.text((corner + 4, y - 6), f"{10**value:.3g}", fill="black")
    pen.text((left, 6), f"{name}: loss by step", fill="black")
    pen.text((left, bottom + 6), "0", fill="black")
    pen.text((right - 30, bottom + 6), str(len(losses)), fill="black")
    if len(losses) > 1:
        mean = [math.log10(max(value, 1e-9)) for value in smoothed(losses)]
        pen.line([at(i, v) for i, v in enumerate(logs)], fill=LINE)
        pen.line([at(i, v) for i, v in enumerate(mean)], fill=SMOOTH, width=2)
