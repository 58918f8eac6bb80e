"""Measure how well text in images can be read by Tesseract, if it is installed."""

from __future__ import annotations

import io
import shutil
import subprocess
import unicodedata
from collections.abc import Sequence

from PIL import Image

from quantize.gate.drawing import Drawing, Measure
from quantize.gate.metrics import Score
from quantize.gate.similarity import Pixels
from quantize.prompt_set import SCRIPTS, Prompt

LEAST_SIDE = 512  # smaller images are enlarged: letters of 16 pixels are too small for Tesseract
SECONDS = 60


def reading_measure(prompts: Sequence[Prompt]) -> Measure | str:
    """Return the measure for all prompts whose script Tesseract can read, or the reason why there are none."""
    asked = {prompt.script for prompt in prompts if prompt.reads}
    if not asked:
        return "no prompt specifies text that its image should show"
    if shutil.which("tesseract") is None:
        return "the program tesseract is not installed (Debian: tesseract-ocr and a tesseract-ocr-... per language)"
    languages = _languages()
    known = {script for script in asked if SCRIPTS[script] in languages}
    if not known:
        wanted = ", ".join(sorted(SCRIPTS[script] for script in asked))
        return f"tesseract has none of the languages {wanted}; it has: {', '.join(sorted(languages))}"

    def measure(prompt: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
        if prompt.script not in known or not prompt.reads:
            return {}
        before, after = (
            closeness(prompt.reads, read(d.pixels, SCRIPTS[prompt.script])) for d in (reference, candidate)
        )
        return {
            "text_change": Score.change(before, after),
            "text_exact_change": Score.change(float(before == 1), float(after == 1)),
        }

    return measure


def _languages() -> set[str]:
    listed = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines()[1:])  # the first line is a title


def read(pixels: Pixels, language: str) -> str:
    """Return all text that Tesseract finds anywhere in an image."""
    image = Image.fromarray(pixels)
    factor = -(-LEAST_SIDE // min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    command = ["tesseract", "stdin", "stdout", "-l", language, "--psm", "11", "--dpi", "150"]
    done = subprocess.run(command, input=stream.getvalue(), capture_output=True, check=True, timeout=SECONDS)
    return done.stdout.decode()


def closeness(asked: str, found: str) -> float:
    """Return the share of the requested text's characters that the best matching passage of the found text has right.

    Case, spacing and compatibility forms are ignored. The share is one minus the edit distance over the length, where
    the passage may begin and end anywhere (Sellers 1980).
    """
    wanted, text = _plain(asked), _plain(found)
    row = [0] * (len(text) + 1)  # fewest edits between the wanted prefix and a passage that ends here
    for number, letter in enumerate(wanted, start=1):
        before, row = row, [number]
        for place, other in enumerate(text, start=1):
            row.append(min(before[place - 1] + (letter != other), before[place] + 1, row[place - 1] + 1))
    return max(0.0, 1 - min(row) / len(wanted))


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
