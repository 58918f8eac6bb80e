"""Draw small line charts and bar charts as SVG text: the same data gives the same bytes, so that a test can compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 36, 48
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
BAR = 22


@dataclass(frozen=True)
class Series:
    """Points of one line, by increasing x."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    color: int = 0
    marks: bool = True


def lines(title: str, x_name: str, y_name: str, series: Sequence[Series], log: bool = False) -> str:
    """Draw lines over two axes, both logarithmic if `log` is set."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_ticks, y_ticks = (_log_ticks(v) if log else _ticks(v) for v in (xs, ys))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    at_x, at_y = _scale(x_ticks, LEFT, right, log), _scale(y_ticks, bottom, TOP, log)
    body = [_text(WIDTH / 2, 20, title, "middle", 14)]
    for tick in x_ticks:
        body.append(f'<path d="M{at_x(tick):.1f} {TOP}V{bottom}" stroke="#ddd"/>')
        body.append(_text(at_x(tick), bottom + 16, f"{tick:g}", "middle"))
    for tick in y_ticks:
        body.append(f'<path d="M{LEFT} {at_y(tick):.1f}H{right}" stroke="#ddd"/>')
        body.append(_text(LEFT - 6, at_y(tick) + 4, f"{tick:g}", "end"))
    body.append(_text((LEFT + right) / 2, HEIGHT - 10, x_name, "middle"))
    body.append(_text(16, (TOP + bottom) / 2, y_name, "middle", turned=True))
    for index, one in enumerate(series):
        color = COLORS[one.color % len(COLORS)]
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in one.points)
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        body.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        if one.marks:
            body += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{color}"/>' for x, y in one.points]
        y = TOP + 8 + 18 * index
        body.append(f'<path d="M{right + 10} {y}h18" stroke="{color}" stroke-width="2"{dashes}/>')
        body.append(_text(right + 32, y + 4, one.name))
    return _document(WIDTH, HEIGHT, body)


def bars(title: str, unit: str, rows: Sequence[tuple[str, float]]) -> str:
    """Draw horizontal bars with their values."""
    left, height = 250, TOP + BAR * len(rows) + 12
    most = max(value for _, value in rows)
    body = [_text(WIDTH / 2, 20, f"{title}, {unit}", "middle", 14)]
    for index, (name, value) in enumerate(rows):
        y, length = TOP + BAR * index, (WIDTH - left - 80) * value / most
        body.append(_text(left - 8, y + 15, name, "end"))
        body.append(f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{BAR - 6}" fill="{COLORS[0]}"/>')
        body.append(_text(left + length + 6, y + 15, f"{value:.3g}"))
    return _document(WIDTH, height, body)


def _scale(ticks: Sequence[float], start: float, end: float, log: bool) -> Callable[[float], float]:
    def flat(value: float) -> float:
        return math.log10(value) if log else value

    low, high = flat(ticks[0]), flat(ticks[-1])
    return lambda value: start + (end - start) * (flat(value) - low) / (high - low)


def _ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers from zero to above the largest value."""
    most = max(values) or 1.0
    step = 10.0 ** math.floor(math.log10(most))
    step = next(step * factor for factor in (0.1, 0.2, 0.5, 1, 2) if step * factor * 6 >= most)
    return [round(step * n, 10) for n in range(math.ceil(most / step - 1e-9) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**n for n in range(low, max(high, low + 1) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _document(width: int, height: int, body: Sequence[str]) -> str:
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([start, f'<rect width="{width}" height="{height}" fill="white"/>', *body, "</svg>"]) + "\n"
