"""Measure the readers of the gate on text that is rendered, not generated: what they misread then is their own error.

Every text that a prompt of the kit asks for is rendered in black on white at several letter heights, sharp and blurred.
The sample's scenes are drawn by its own code, with its bitmap font. DejaVu, which matplotlib contains, covers Latin,
Cyrillic, Greek, Arabic, Hebrew and Georgian; other scripts need `--font SCRIPT=FILE`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks.machine import describe
from kit.errors import UsageError
from quantize.gate.intervals import interval
from quantize.gate.readers import RAPID, Read, readers
from quantize.gate.reading import closeness
from quantize.gate.similarity import Pixels
from quantize.prompt_set import SCRIPTS, Prompt, load

SIDE, MARGIN = 768, 40  # pixels
HEIGHTS = (24, 36, 56)  # pixels of a line
BLUR = 0.12  # radius over height: letters lose their fine strokes
DEJAVU = ("latin", "cyrillic", "greek", "arabic", "hebrew", "georgian")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--font",
        action="append",
        default=[],
        metavar="SCRIPT=FILE",
        help="font of a script; default: DejaVu where it has the script, others are left out",
    )
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="scenes of the sample with a word")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read rendered texts of every script that has a font and a reader, and words in the sample's scenes."""
    chosen = fonts(args.font)
    prompts = [prompt for prompt in load("kit").prompts if prompt.reads]
    found, missing = readers(dict.fromkeys(prompt.script for prompt in prompts))
    rows: dict[str, Any] = {}
    for script in SCRIPTS:
        if script in found and script in chosen:
            texts = [prompt for prompt in prompts if prompt.script == script]
            rows[script] = {
                "reader": "RapidOCR" if found[script] is found.get(RAPID[0]) and script in RAPID else "Tesseract",
                "texts": len(texts),
                **{name: read_back(found[script], texts, chosen[script], blur) for name, blur in LOOKS.items()},
            }
        else:
            missing.setdefault(script, "no font: give one with --font")
    if "latin" in found and args.scenes:
        reader = rows["latin"]["reader"]
        rows["sample"] = {"reader": reader, "texts": args.scenes, "sharp": scenes(found["latin"], args.scenes)}
    return {"benchmark": "reading", "machine": describe(), "scripts": rows, "left_out": missing}


LOOKS = {"sharp": 0.0, "blurred": BLUR}


def fonts(given: Sequence[str]) -> dict[str, Path]:
    """Return a font file per script; raises UsageError for a script or a file that does not exist."""
    import matplotlib

    dejavu = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    chosen = dict.fromkeys(DEJAVU, dejavu)
    for word in given:
        script, _, file = word.partition("=")
        if script not in SCRIPTS:
            raise UsageError(f"--font {word}: unknown script {script!r}; there are: {', '.join(SCRIPTS)}")
        if not Path(file).is_file():
            raise UsageError(f"--font {word}: there is no file {file!r}")
        chosen[script] = Path(file)
    return chosen


def read_back(read: Read, prompts: Sequence[Prompt], font: Path, blur: float) -> dict[str, Any]:
    """Return the share of characters and of whole texts that are read, with 95 % intervals over the texts."""
    shares = [[closeness(p.reads, read(render(p.reads, font, height, blur))) for height in HEIGHTS] for p in prompts]
    return _facts(shares)


def scenes(read: Read, count: int) -> dict[str, Any]:
    """Return the same for true drawings of the sample's scenes."""
    from kit.sample.draw import draw
    from kit.sample.world import parse

    worded = [prompt for prompt in load(f"sample:{4 * count}").prompts if prompt.reads][:count]
    return _facts([[closeness(prompt.reads, read(draw(parse(prompt.text))))] for prompt in worded])


def _facts(shares: list[list[float]]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, values in (("characters", shares), ("whole", [[float(s == 1) for s in row] for row in shares])):
        constant = len({value for row in values for value in row}) == 1
        found = interval([[value - 1 for value in row] for row in values], 1.0 if constant else 0.0)
        facts[name] = {key: round(min(1.0, 1 + getattr(found, key)), 4) for key in ("mean", "low", "high")}
    return facts


def render(text: str, font: Path, height: int, blur: float = 0.0) -> Pixels:
    """Draw each line of a text, broken where it is too long, as one element below the other: [SIDE, SIDE, 3]."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, face = ImageDraw.Draw(image), ImageFont.truetype(str(font), height)
    top = MARGIN
    for element in text.splitlines():
        for line in _broken(element, face):
            pen.text((MARGIN, top), line, font=face, fill="black")
            top += round(1.4 * height)
        top += height
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur * height))
    return np.asarray(image)


def _broken(text: str, face: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text at spaces, or between letters if it has none, into lines that fit the image."""
    joint = " " if " " in text else ""
    lines: list[str] = []
    for word in text.split(" ") if joint else text:
        longer = f"{lines[-1]}{joint}{word}" if lines else word
        if lines and face.getlength(longer) <= SIDE - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def table(facts: dict[str, Any]) -> str:
    """Format the accuracy per script."""
    lines = ["script      reader     texts  characters, whole texts (95 %)           blurred"]
    for script, row in facts["scripts"].items():
        cells = [
            f"{100 * look['characters']['mean']:.1f} %, {100 * look['whole']['mean']:.0f} % "
            f"({100 * look['whole']['low']:.0f} to {100 * look['whole']['high']:.0f})"
            for name in LOOKS
            if (look := row.get(name))
        ]
        lines.append(f"{script:<12}{row['reader']:<11}{row['texts']:<7}{'   '.join(cells)}")
    return "\n".join([*lines, *(f"{script}: left out, {reason}" for script, reason in facts["left_out"].items())])
