"""Measure with the sample's judge how many of a scene's facts an image shows."""

from __future__ import annotations

from collections.abc import Sequence

from kit.sample.judge import read
from kit.sample.score import perfect, score
from kit.sample.world import SIDE, parse
from quantize.gate.drawing import Drawing, Measure
from quantize.gate.metrics import Score
from quantize.gate.similarity import Pixels
from quantize.prompt_set import Prompt


def judge_measure(prompts: Sequence[Prompt], width: int, height: int) -> Measure | str:
    """Return the measure, or the reason why these prompts cannot be judged."""
    if (width, height) != (SIDE, SIDE):
        return f"the judge reads images of {SIDE} x {SIDE} pixels, not {width} x {height}"
    for prompt in prompts:
        try:
            parse(prompt.text)
        except ValueError:
            return f"the judge knows only the sample's grammar, and prompt {prompt.id} is not in it"
    return _measure


def _measure(prompt: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
    (before, whole_before), (after, whole_after) = (judged(prompt.text, d.pixels) for d in (reference, candidate))
    return {
        "judge_change": Score.change(before, after),
        "judge_exact_change": Score.change(float(whole_before), float(whole_after)),
    }


def judged(text: str, image: Pixels) -> tuple[float, bool]:
    """Return the share of a scene's facts that the image shows, and whether it shows all of them and nothing else.

    The facts are the shape, colour and size of every object, the number of objects, their positions, the background and
    the word.
    """
    found = score(parse(text), read(image))
    right = found.shapes + found.colours + found.sizes
    right += found.exact + found.position + found.background + found.word
    return right / (3 * found.things + 4), perfect(found)
