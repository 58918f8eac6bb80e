"""Draw the distribution of one metric over all pairs as a small SVG, with the bound and the worst pairs marked."""

from __future__ import annotations

from html import escape

import numpy as np

from quantize.gate.contract import Bound
from quantize.gate.report import Row

BARS, WIDTH, HEIGHT = 24, 280, 72  # SVG units; the page scales it


def histogram(row: Row, values: list[float], bound: Bound | None) -> str:
    """Return an SVG; the worst 5 % of the pairs have another colour, and a line marks the bound of the tail.

    Return a sentence if all values are equal.
    """
    low, high = min(values), max(values)
    if low == high:
        return f"<p>The same in all pairs: {row.shown(low)}</p>"
    worse_is_low = row.metric.better == "higher"
    marks = [] if bound is None or bound.tail is None else [bound.tail]
    left, right = min([low, *marks]), max([high, *marks])
    span = right - left
    counts, edges = np.histogram(values, bins=BARS, range=(left, left + span))
    tallest = max(1, int(counts.max()))
    bars = []
    for number, count in enumerate(counts):
        height = (HEIGHT - 16) * int(count) / tallest
        middle = (edges[number] + edges[number + 1]) / 2
        tail = middle < row.tail if worse_is_low else middle > row.tail
        bars.append(
            f'<rect x="{number * WIDTH / BARS:.1f}" y="{HEIGHT - 16 - height:.1f}" width="{WIDTH / BARS - 1:.1f}" '
            f'height="{height:.1f}" class="{"tail" if tail else "bar"}"/>'
        )
    for mark in marks:
        place = (mark - left) / span * WIDTH
        bars.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{HEIGHT - 14}" class="bound"/>')
    ends = (
        f'<text x="0" y="{HEIGHT - 3}">{row.shown(left)}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 3}" text-anchor="end">{row.shown(right)}</text>'
    )
    label = escape(f"{row.metric.name} of {len(values)} pairs", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(bars)}{ends}</svg>'
