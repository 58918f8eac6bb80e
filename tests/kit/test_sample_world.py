"""The sample's world: a grammar that parses its own sentences, drawings, and a judge that reads them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.sample.evaluate import judge_drawings
from kit.sample.draw import Style, draw, first_column
from kit.sample.font import GLYPHS, glyph
from kit.sample.judge import components, filled, read
from kit.sample.score import perfect, score
from kit.sample.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_WORDS,
    LAYOUTS,
    SHAPES,
    SIDE,
    SIZES,
    UNSEEN_SHAPES,
    Scene,
    Thing,
    parse,
    random_scene,
)


def test_every_random_scene_is_read_back_from_its_sentence() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng, SHAPES + UNSEEN_SHAPES)
        assert parse(scene.prompt()) == scene


def test_the_example_sentence_is_in_the_grammar() -> None:
    scene = parse("a red circle left of a blue square on a white background, with the word HELLO")
    things = (Thing("circle", "red"), Thing("square", "blue"))
    assert scene == Scene(things, "left of", "white", "HELLO")


def test_a_background_may_be_left_unsaid_and_is_white() -> None:
    assert parse("a small orange heart") == parse("a small orange heart on a white background")


@pytest.mark.parametrize("prompt", ["", "a cat", "a red circle on a red background", "a red circle, with the word hi"])
def test_other_text_is_refused_with_an_example(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a sentence of the sample's grammar: .* for example: 'a red circle"):
        parse(prompt)


def test_training_scenes_hold_no_star_and_no_held_out_word() -> None:
    rng = random.Random(1)
    scenes = [random_scene(rng) for _ in range(2000)]
    assert not {thing.shape for scene in scenes for thing in scene.things} & set(UNSEEN_SHAPES)
    assert not {scene.word for scene in scenes} & set(HELD_OUT_WORDS)


def test_every_layout_keeps_its_things_inside_the_image() -> None:
    for layouts in LAYOUTS:
        for name, centres in layouts.items():
            for x, y in centres:
                assert 19 <= min(x, y) <= max(x, y) <= SIDE - 19, name


def test_the_font_has_twenty_six_different_letters() -> None:
    assert sorted(GLYPHS) == [chr(ord("A") + i) for i in range(26)]
    assert len({glyph(letter).tobytes() for letter in GLYPHS}) == 26
    assert all(glyph(letter).shape == (7, 5) for letter in GLYPHS)


def test_a_letter_outside_the_font_is_named() -> None:
    with pytest.raises(KeyError, match="no glyph for '7'"):
        glyph("7")


def test_letters_fill_whole_image_tokens() -> None:
    assert [first_column(word) for word in ("FOX", "JAZZ", "HELLO")] == [2, 2, 1]


def test_the_judge_reads_true_drawings() -> None:
    found = judge_drawings(200, seed=21)
    for key in ("shapes", "colours", "sizes", "counts", "positions", "backgrounds", "words"):
        assert found[key] >= 0.995, (key, found)


def test_the_judge_reads_every_letter_of_the_font() -> None:
    for word in ("ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY", "XYZ"):
        scene = Scene((Thing("circle", "red"),), word=word)
        assert read(draw(scene)).word == word


def test_the_judge_does_not_see_what_was_not_asked() -> None:
    asked = parse("a red circle left of a blue square on a white background, with the word HELLO")
    for other in (
        "a red circle right of a blue square on a white background, with the word HELLO",
        "a red circle left of a green square on a white background, with the word HELLO",
        "a red circle left of a blue diamond on a white background, with the word HELLO",
        "a red circle left of a blue square on a black background, with the word HELLO",
        "a red circle left of a blue square on a white background, with the word HELLA",
        "a red circle on a white background, with the word HELLO",
        "a red circle left of a large blue square on a white background, with the word HELLO",
    ):
        assert not perfect(score(asked, read(draw(parse(other))))), other
    assert perfect(score(asked, read(draw(asked))))


def test_noise_holds_no_perfect_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    assert not perfect(score(parse("a red circle"), read(noise)))


def test_an_outline_is_told_from_a_filled_shape() -> None:
    scene = Scene((Thing("circle", "red"),))
    assert [read(draw(scene, style=style)).things[0].style for style in ("filled", "outlined")] == [
        "filled",
        "outlined",
    ]


def test_another_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 128x128 RGB bytes, not \(64, 64, 3\) of uint8"):
        read(np.zeros((64, 64, 3), np.uint8))


def test_colours_are_far_from_one_another() -> None:
    values = [np.array(value, float) for value in COLOURS.values()]
    nearest = min(np.linalg.norm(a - b) for i, a in enumerate(values) for b in values[:i])
    assert nearest >= 70


def test_touching_corners_make_one_component_and_holes_are_filled() -> None:
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[1, 1] = mask[4, 4] = True
    assert [int(piece.sum()) for piece in components(mask)] == [2, 1]
    ring = np.ones((4, 4), bool)
    ring[1:3, 1:3] = False
    assert filled(ring).all()


@pytest.mark.parametrize("style", ["filled", "outlined"])
@pytest.mark.parametrize("shape", SHAPES + UNSEEN_SHAPES)
def test_the_judge_tells_an_outline_of_every_shape_from_its_body(shape: str, style: Style) -> None:
    for size in SIZES:
        for background in BACKGROUNDS:
            scene = Scene((Thing(shape, "red", size),), "", background)
            assert [thing.style for thing in read(draw(scene, None, style)).things] == [style], (size, background)
