"""Texts read back from images: the score, which reader reads which script, and how well the readers read clean text."""

from __future__ import annotations

import importlib.util
import random
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reading import BLUR, fonts, render
from quantize.gate import reading
from quantize.gate.drawing import Drawing
from quantize.gate.readers import RAPID, rapid_reader, readers, tesseract_reader
from quantize.gate.reading import closeness
from quantize.gate.similarity import Pixels
from quantize.prompt_set import SCRIPTS, Prompt, load

WORDED = Prompt("a", "x", "a red circle on a white background, with the word HELLO", "HELLO", "latin")
FOREIGN = Prompt("b", "x", "a sign", "чай", "cyrillic")


def drawing(level: int) -> Drawing:
    return Drawing(np.full((32, 32, 3), level, np.uint8), np.ones((2, 4), np.float32))


@pytest.mark.parametrize(
    ("asked", "found", "share"),
    [
        ("HELLO", "HELLO", 1),
        ("Open Late", "the sign:\nopen  late!", 1),  # case, spacing and surrounding text are ignored
        ("HELLO", "HELO", 0.8),  # one missing
        ("HELLO", "HXLLO", 0.8),  # one wrong
        ("HELLO", "", 0),
        ("茶馆", "茶館", 0.5),
        ("No", "XXXXXXXX", 0),
        ("شكر", "\u200fشكر\u200e", 1),  # marks of direction
        ("FAIR\nnine to four", "nine to four\nFAIR", 1),  # elements in any order
        ("FAIR\nnine to four", "FAIR", 6 / 14),  # elements count by their length; F and R occur in the second, too
    ],
)
def test_text_read_back_is_scored_by_its_best_passages(asked: str, found: str, share: float) -> None:
    assert closeness(asked, found) == pytest.approx(share)


@pytest.fixture
def without_rapidocr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def fake_tesseract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a fake tesseract on the path that knows only English and reads the same text in every image."""
    program = tmp_path / "tesseract"
    program.write_text(
        "#!/bin/sh\nif [ $1 = --list-langs ]; then echo title; echo eng; else cat >/dev/null; echo HELO; fi\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("fake_tesseract", "without_rapidocr")
def test_without_rapidocr_tesseract_reads_the_scripts_that_it_has() -> None:
    measure, missing = reading.reading_measure([WORDED, FOREIGN])
    assert measure is not None
    scores = measure(WORDED, drawing(0), drawing(255))
    assert scores["text_change"].levels == pytest.approx((0.8, 0.8))
    assert scores["text_exact_change"].levels == (0, 0)
    assert measure(FOREIGN, drawing(0), drawing(255)) == {}
    assert missing == {"text in cyrillic": "tesseract does not have the language rus; it has: eng"}


@pytest.mark.usefixtures("fake_tesseract", "without_rapidocr")
def test_texts_in_other_scripts_alone_are_not_measured() -> None:
    measure, missing = reading.reading_measure([FOREIGN])
    assert measure is None
    assert set(missing.values()) == {"cyrillic: tesseract does not have the language rus; it has: eng"}
    assert missing.keys() == {"text_change", "text_exact_change"}


@pytest.mark.usefixtures("without_rapidocr")
def test_without_a_reader_the_reason_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    _, missing = reading.reading_measure([WORDED])
    assert "rapidocr is not installed (extra quality), and" in missing["text_change"]
    assert "Debian: tesseract-ocr-eng" in missing["text_change"]
    _, missing = reading.reading_measure([Prompt("c", "x", "a dog")])
    assert missing["text_change"] == "no prompt specifies text that its image should show"


def blank(side: int = 64) -> Pixels:
    return np.full((side, side, 3), 255, np.uint8)


class TestRapidOCR:
    """The real package; its wheel contains the models."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("rapidocr", reason="rapidocr is not installed (extra quality)")

    def test_it_is_the_reader_of_its_scripts_even_where_tesseract_is_missing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "")
        found, missing = readers(SCRIPTS)
        assert found.keys() == set(RAPID)
        assert missing.keys() == SCRIPTS.keys() - set(RAPID)

    def test_it_reads_the_kits_latin_texts_of_many_words(self) -> None:
        font = fonts([])["latin"]
        read = rapid_reader()
        posters = [p.reads for p in load("kit").prompts if p.category == "posters" and p.script == "latin"]
        assert min(closeness(text, read(render(text, font, 36))) for text in posters) > 0.98

    def test_blurred_letters_are_misread(self) -> None:
        """A reader that guesses the word from the language would not see the fault."""
        font, read = fonts([])["latin"], rapid_reader()
        text = next(p.reads for p in load("kit").prompts if p.id == "posters-02")
        assert closeness(text, read(render(text, font, 24, 2 * BLUR))) < 0.9

    def test_it_reads_the_words_of_the_samples_true_drawings(self) -> None:
        from kit.sample.draw import draw
        from kit.sample.world import parse

        read = rapid_reader()
        worded = [prompt for prompt in load("sample:24").prompts if prompt.reads][:8]
        shares = [closeness(prompt.reads, read(draw(parse(prompt.text), random.Random(0)))) for prompt in worded]
        assert np.mean(shares) > 0.95

    def test_an_image_without_text_gives_none(self) -> None:
        assert rapid_reader()(blank()) == ""


@pytest.mark.parametrize("script", ["latin", "cyrillic", "arabic"])
def test_tesseract_reads_rendered_text_of_its_languages(script: str) -> None:
    """Where the program is installed; on Debian: tesseract-ocr, tesseract-ocr-rus, tesseract-ocr-ara."""
    if shutil.which("tesseract") is None:
        pytest.skip("the program tesseract is not installed")
    from quantize.gate.readers import _languages

    if SCRIPTS[script] not in _languages():
        pytest.skip(f"tesseract does not have the language {SCRIPTS[script]}")
    text = next(p.reads for p in load("kit").prompts if p.category == "posters" and p.script == script)
    read = tesseract_reader(SCRIPTS[script])
    assert closeness(text, read(render(text, fonts([])[script], 24))) > 0.95
