"""Read text in images: by RapidOCR in the scripts that its wheel's models know, by Tesseract in the others."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from PIL import Image

from quantize.gate.similarity import Pixels
from quantize.prompt_set import SCRIPTS

RAPID = ("latin", "chinese", "japanese")  # scripts of PP-OCRv6 small, whose weights the wheel of rapidocr contains
# Smaller images are enlarged, because letters of 16 pixels are too small for both readers. RapidOCR reads the sample's
# images as well at 256 pixels as at 512, in a third of the time.
RAPID_SIDE, TESSERACT_SIDE = 256, 512
SECONDS = 60
Read = Callable[[Pixels], str]  # all text that is found anywhere in an image, one line each


def readers(scripts: Collection[str]) -> tuple[dict[str, Read], dict[str, str]]:
    """Return a reader per script, and for each script without one the reason."""
    found: dict[str, Read] = {}
    missing: dict[str, str] = {}
    rapid = rapid_reader() if set(scripts) & set(RAPID) and importlib.util.find_spec("rapidocr") else None
    languages = _languages()
    for script in scripts:
        if rapid is not None and script in RAPID:
            found[script] = rapid
        elif SCRIPTS[script] in languages:
            found[script] = tesseract_reader(SCRIPTS[script])
        else:
            missing[script] = _reason(script, languages)
    return found, missing


def _reason(script: str, languages: Collection[str]) -> str:
    rapid = "the package rapidocr is not installed (extra quality), and " if script in RAPID else ""
    if not languages:
        return f"{rapid}the program tesseract is not installed (Debian: tesseract-ocr-{SCRIPTS[script]})"
    return f"{rapid}tesseract does not have the language {SCRIPTS[script]}; it has: {', '.join(sorted(languages))}"


def rapid_reader() -> Read:
    """Return a reader with the models in the wheel of rapidocr; nothing is downloaded."""
    import rapidocr

    settings = {"Global.log_level": "error", "Global.use_cls": False, "Det.limit_side_len": RAPID_SIDE}
    engine: Any = rapidocr.RapidOCR(params=settings)

    def read(pixels: Pixels) -> str:
        bgr = np.ascontiguousarray(np.asarray(_enlarged(pixels, RAPID_SIDE))[:, :, ::-1])
        return "\n".join(engine(bgr).txts or ())

    return read


def tesseract_reader(language: str) -> Read:
    """Return a reader with one of Tesseract's languages."""

    def read(pixels: Pixels) -> str:
        stream = io.BytesIO()
        _enlarged(pixels, TESSERACT_SIDE).save(stream, "PNG")
        command = ["tesseract", "stdin", "stdout", "-l", language, "--psm", "11", "--dpi", "150"]
        done = subprocess.run(command, input=stream.getvalue(), capture_output=True, check=True, timeout=SECONDS)
        return done.stdout.decode()

    return read


def _languages() -> set[str]:
    """Return the languages that Tesseract has, none if it is not installed."""
    if shutil.which("tesseract") is None:
        return set()
    listed = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines()[1:])  # the first line is a title


def _enlarged(pixels: Pixels, least: int) -> Image.Image:
    image = Image.fromarray(pixels)
    factor = -(-least // min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    return image
