"""The pairs that the page shows."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from quantize.gate.contract import Bound, of_recipe
from quantize.gate.drawing import Pair
from quantize.gate.histogram import BARS, histogram
from quantize.gate.metrics import Score
from quantize.gate.page import STYLE, chosen, page
from quantize.gate.report import Report, summarize
from quantize.prompt_set import Prompt


def report(count: int) -> Report:
    """Make pairs whose FLIP falls with their number; only number 7 lost something by the judge."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    pairs = [
        Pair(
            number,
            Prompt(f"p{number}", "x", "a dog"),
            number,
            {"flip": Score((count - number) / 100), "judge_change": Score(-0.5 * (number == 7), (1, 1))},
            [1.0],
        )
        for number in order
    ]
    return summarize(pairs, {}, of_recipe("fp8"), {}, ())


def test_the_page_shows_the_worst_of_each_metric_the_worst_by_flip_and_a_spread_in_order() -> None:
    shown = [pair.number for pair in chosen(report(40), 7)]
    assert shown == sorted(shown)
    assert len(shown) == 7
    assert {0, 1, 2, 7, 39} <= set(shown)


def test_a_histogram_marks_the_worst_pairs_and_the_bound_of_the_tail() -> None:
    found = report(40)
    row = found.rows["flip"]
    values = [pair.scores["flip"].value for pair in found.pairs]
    drawn = histogram(row, values, Bound("flip", 0.5, tail=0.6))
    assert drawn.count('class="bar"') + drawn.count('class="tail"') == BARS
    assert drawn.count('class="tail"') >= 1
    assert drawn.count('class="bound"') == 1
    assert 'class="bound"' not in histogram(row, values, None)
    assert histogram(row, [0.1, 0.1], None) == "<p>The same in all pairs: 0.1000</p>"


def test_every_cell_of_the_page_names_its_column_for_narrow_screens_where_the_head_is_hidden() -> None:
    setting = {
        **{side: {"name": side, "recipe": "fp8", "compute": "fp32"} for side in ("candidate", "reference")},
        "prompts": {"count": 9, "spec": "x", "digest": "0"},
        "seeds": 1,
        "canvas": {"width": 128, "height": 128, "steps": 4, "guidance": 1.0},
        "date": "2026-11-27",
    }
    written = page(replace(report(9), setting=setting), [])
    row = re.search("<tr><td>flip</td>.*?</tr>", written)
    assert row is not None
    named = ("mean", "95 % interval", "bound", "worst 5 %", "worst", "of prompt, seed")
    assert re.findall('data-head="(.*?)"', row[0]) == list(named)
    assert re.search(r"@media \(max-width.*attr\(data-head\)", written, re.DOTALL)


def test_few_pairs_are_all_shown_and_none_if_zero_are_requested() -> None:
    assert [pair.number for pair in chosen(report(9), 24)] == list(range(9))
    assert chosen(report(9), 0) == []
    assert len(chosen(report(9), 1)) == 1


def test_nothing_on_the_page_is_wider_than_a_screen_of_420_pixels() -> None:
    """The rules are checked, not a rendered page: fixed widths fit between the margins, and tables fold."""
    narrow, rem = 420, 16
    room = narrow - 2 * rem  # the body's padding
    fixed = re.findall(r"(?<![-\w])(?:min-)?width:\s*([\d.]+)(px|rem)|minmax\(([\d.]+)(px|rem)", STYLE)
    lengths = [(number or column, unit or other) for number, unit, column, other in fixed]
    assert lengths == [("17", "rem")]  # a column of measures; `max-width` and `min(...)` only make things smaller
    assert all(float(number) * (rem if unit == "rem" else 1) <= room for number, unit in lengths)
    (limit,) = re.findall(r"@media \(max-width: (\d+)rem\)", STYLE)
    assert int(limit) * rem > narrow
    folded = STYLE.split("@media")[1]
    assert "table, tbody { display: block; }" in folded
    assert "white-space: normal" in folded
    assert "th { display: none; }" in folded
    for rule in ("img { width: 100%", "svg { width: 100%", ".wide { overflow-x: auto", "h1 { font-size"):
        assert rule in STYLE
    assert STYLE.count("overflow-wrap: anywhere") == 2  # titles and prompts, whose words may be longer than a line
