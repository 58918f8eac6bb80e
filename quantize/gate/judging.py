"""The sample's judge as a measure: how many of a scene's facts an image shows."""

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
    """Return the judge, or why it cannot judge these prompts."""
    if (width, height) != (SIDE, SIDE):
        return f"the judge reads images of {SIDE} x {SIDE} pixels, not of {width} x {height}"
    for prompt in prompts:
        try:
            parse(prompt.text)
        except ValueError:
            return f"the judge knows the sample's grammar only, of which prompt {prompt.id} is no sentence"
    return _measure


def _measure(prompt: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
    (before, whole_before), (after, whole_after) = (judged(prompt.text, d.pixels) for d in (reference, candidate))
    return {
        "judge_change": Score.change(before, after),
        "judge_exact_change": Score.change(float(whole_before), float(whole_after)),
    }


def judged(text: str, image: Pixels) -> tuple[float, bool]:
    """Return the share of a scene's facts that the image shows, and whether it shows all and nothing else.

    The facts are shape, colour and size of every thing, the number of things, their places, the background, the word.
    """
    found = score(parse(text), read(image))
    right = found.shapes + found.colours + found.sizes
    right += found.exact + found.position + found.background + found.word
    return right / (3 * found.things + 4), perfect(found)
