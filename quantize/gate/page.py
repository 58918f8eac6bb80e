"""Write the HTML page that shows image pairs with their difference maps; it loads only the PNG files next to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from quantize.gate.drawing import SIDES, Pair
from quantize.gate.histogram import histogram
from quantize.gate.report import HEAD, Report, steps_table, summary, table, verdict
from quantize.gate.similarity import flip_map

PAGE = "index.html"
IMAGES = "images"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
.verdict { font-size: 1.5rem; font-weight: 600; padding: .6rem 1rem; border-left: .5rem solid; margin: 1rem 0; }
.kept { color: #0a6b2d; } .broken { color: #b00020; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; }
.measures { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.measures h3 { margin: 0; font-size: 1rem; } .measures p { margin: 0; color: #555; font-size: 13px; }
svg { width: 100%; } svg text { font: 10px system-ui, sans-serif; fill: #555; }
.bar { fill: #4c72b0; } .tail { fill: #c44e52; } .bound { stroke: #1a1a1a; stroke-dasharray: 3 2; }
article { margin: 2rem 0; } article p { overflow-wrap: anywhere; }
article div { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; }
figure { margin: 0; } figcaption, small { color: #555; font-size: 13px; }
img { width: 100%; display: block; } img.small { image-rendering: pixelated; }
@media (max-width: 40rem) {  /* each row of a table becomes a block, so that no column is out of sight */
  table, tbody { display: block; }
  tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; padding: .5rem 0; border-bottom: 1px solid #ddd; }
  th { display: none; } td { display: block; border: 0; padding: 0; white-space: normal; }
  td:first-child { grid-area: 1 / 1; font-weight: 600; } td:empty { display: none; }
  td.kept, td.broken { grid-area: 1 / 2; }
  td[data-head]::before { content: attr(data-head) " "; color: #555; font-weight: 400; }
}
.scale { height: .8rem; width: min(16rem, 100%);
  background: linear-gradient(90deg, #000004, #3b0f70, #8c2981, #de4968, #fe9f6d, #fcfdbf); }
"""


def chosen(report: Report, count: int) -> list[Pair]:
    """Choose the pairs to show and sort them by FLIP, the largest difference first.

    The worst pair of each metric is always shown. Half of the remaining places go to the worst pairs by FLIP, the other
    half are spread evenly over the rest.
    """
    ranked = sorted(report.pairs, key=lambda pair: -pair.scores["flip"].value)
    picked = dict.fromkeys(row.worst.number for row in report.rows.values() if row.lost)
    rest = [pair.number for pair in ranked if pair.number not in picked]
    left = max(0, count - len(picked))
    if left >= len(rest):
        places = list(range(len(rest)))
    else:
        worst = (left + 1) // 2
        places = [*range(worst), *np.linspace(worst, len(rest) - 1, left - worst).round().astype(int).tolist()]
    kept = {*list(picked)[:count], *(rest[place] for place in places)}
    return [pair for pair in ranked if pair.number in kept]


def keep_images(folder: Path, pairs: Sequence[Pair], shown: Sequence[Pair]) -> None:
    """Write the difference maps of the pairs that are shown and remove the images of all others."""
    kept = {pair.number for pair in shown}
    for pair in pairs:
        paths = [folder / pair.image(side) for side in SIDES]
        if pair.number in kept:
            reference, candidate = (np.asarray(Image.open(path)) for path in paths)
            Image.fromarray(flip_map(reference, candidate)).save(folder / map_of(pair))
        else:
            for path in paths:
                path.unlink()


def map_of(pair: Pair) -> str:
    """Return the file name of a pair's difference map."""
    return f"{pair.number:05d}-difference.png"


def page(report: Report, shown: Sequence[Pair]) -> str:
    """Return the page as HTML; all text from outside is escaped."""
    setting = report.setting
    title = f"{setting['candidate']['name']} against {setting['reference']['name']}"
    state = "kept" if report.kept else "broken"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict {state}">{verdict(report)}: {escape(report.contract.name)}</p>',
        f"<p>{escape(summary(report))}</p>",
        _list([f"Broken: {fault}" for fault in report.faults] + [f"Warning: {warning}" for warning in report.warnings]),
        _table(HEAD, table(report)),
        "<h2>What each measure means</h2>",
        "<p>The distribution over all pairs. Red: the worst 5 %; dashed line: the bound for them.</p>",
        f'<div class="measures">{"".join(_measures(report))}</div>',
        *_steps(report),
        _list(f"not measured: {name}, because {reason}" for name, reason in report.unmeasured.items()),
        "<h2>Images</h2>",
        f"<p>{len(shown)} of {len(report.pairs)} pairs, sorted by difference: the worst pair of each metric, the worst "
        "pairs by FLIP, and others spread evenly over the rest. The third image shows FLIP per pixel, from 0 (left) "
        "to 1 (right):</p>",
        '<div class="scale"></div>',
        *(_article(pair, report) for pair in shown),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _measures(report: Report) -> Iterable[str]:
    """Yield the meaning and the histogram of each metric."""
    bounds = {bound.metric: bound for bound in report.contract.bounds}
    for name, row in report.rows.items():
        values = [pair.scores[name].value for pair in report.pairs if name in pair.scores]
        about = f"{row.metric.about}; {row.metric.better} is better"
        yield (
            f"<section><h3>{escape(name)} {row.shown(row.found.mean)}</h3><p>{escape(about)}</p>"
            f"{histogram(row, values, bounds.get(name))}</section>"
        )


def _steps(report: Report) -> list[str]:
    if not report.steps:
        return []
    title = "<h2>Cosine of the latents after each step</h2>"
    return [title, _table(("step", "mean", "95 % interval"), steps_table(report))]


def _article(pair: Pair, report: Report) -> str:
    kind = ' class="small"' if report.setting["canvas"]["width"] < 256 else ""
    worst = [name for name, row in report.rows.items() if row.lost and row.worst is pair]
    names = zip((*SIDES, "difference"), (*(pair.image(side) for side in SIDES), map_of(pair)), strict=True)
    figures = "".join(
        f'<figure><img{kind} loading="lazy" src="{IMAGES}/{name}" alt="{side}"><figcaption>{side}</figcaption></figure>'
        for side, name in names
    )
    scores = ", ".join(f"{name} {score.value:.4g}" for name, score in pair.scores.items())
    return (
        f"<article><p>{escape(pair.prompt.text)}<br><small>{escape(pair.prompt.id)}, seed {pair.seed}: {escape(scores)}"
        f"{escape('; the worst by ' + ', '.join(worst)) if worst else ''}</small></p><div>{figures}</div></article>"
    )


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cell(name: str, text: str) -> str:
        label = f' data-head="{escape(name)}"' if name and name != head[0] else ""  # shown where the head is not
        return f"<td{_class(text)}{label}>{escape(text)}</td>"

    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(cell, head, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{titles}</tr>{lines}</table></div>'


def _class(cell: str) -> str:
    return f' class="{cell}"' if cell in ("kept", "broken") else ""
