"""Measure how much of the text that a prompt asks for can be read in its images."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from quantize.gate.drawing import Drawing, Measure
from quantize.gate.metrics import Score
from quantize.gate.readers import readers
from quantize.prompt_set import Prompt

NAMES = ("text_change", "text_exact_change")


def reading_measure(prompts: Sequence[Prompt]) -> tuple[Measure | None, dict[str, str]]:
    """Return the measure for prompts whose script has a reader, and the reasons for what is not measured."""
    asked = dict.fromkeys(prompt.script for prompt in prompts if prompt.reads)
    if not asked:
        return None, dict.fromkeys(NAMES, "no prompt specifies text that its image should show")
    known, missing = readers(asked)
    if not known:
        return None, dict.fromkeys(NAMES, "; ".join(f"{script}: {reason}" for script, reason in missing.items()))

    def measure(prompt: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
        if prompt.script not in known or not prompt.reads:
            return {}
        read = known[prompt.script]
        before, after = (closeness(prompt.reads, read(side.pixels)) for side in (reference, candidate))
        return {
            "text_change": Score.change(before, after),
            "text_exact_change": Score.change(float(before == 1), float(after == 1)),
        }

    return measure, {f"text in {script}": reason for script, reason in missing.items()}


def closeness(asked: str, found: str) -> float:
    """Return the share of the requested text's characters that are right in the found text.

    Each line of the requested text is one element of the image, and is compared with the best matching passage of the
    found text: its share is one minus the edit distance over its length, where the passage may begin and end anywhere
    (Sellers 1980). Elements count by their length. Case, spacing, compatibility forms and marks of direction are
    ignored.
    """
    text = _plain(found)
    elements = [plain for line in asked.splitlines() if (plain := _plain(line))]
    wrong = sum(min(len(element), _least_edits(element, text)) for element in elements)
    return 1 - wrong / sum(map(len, elements))


def _least_edits(wanted: str, text: str) -> int:
    """Return the smallest edit distance between `wanted` and any passage of a text."""
    row = [0] * (len(text) + 1)  # fewest edits between the wanted prefix and a passage that ends here
    for number, letter in enumerate(wanted, start=1):
        before, row = row, [number]
        for place, other in enumerate(text, start=1):
            row.append(min(before[place - 1] + (letter != other), before[place] + 1, row[place - 1] + 1))
    return min(row)


def _plain(text: str) -> str:
    letters = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in letters if not letter.isspace() and unicodedata.category(letter) != "Cf")
