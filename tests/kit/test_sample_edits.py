"""The sample's edits: instructions that parse back, results by position, and a judge of edited images."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kit.sample.draw import draw
from kit.sample.edit_score import EditScore, picture_from, score_edit
from kit.sample.edits import (
    KINDS,
    Add,
    Picture,
    Recolour,
    Remove,
    SetWord,
    apply,
    kind_of,
    name_in,
    parse_edit,
    picture_of,
    random_edit,
)
from kit.sample.judge import read
from kit.sample.world import HELD_OUT_WORDS, PLACES, Thing, parse, random_scene

PAIR = picture_of(parse("a red circle left of a blue square on a white background, with the word HELLO"))
LONE = picture_of(parse("a small red circle on a black background"))


def test_every_random_edit_is_read_back_from_its_instruction_and_applies() -> None:
    rng = random.Random(0)
    kinds = set()
    for _ in range(500):
        scene = random_scene(rng)
        edit = random_edit(rng, scene)
        kinds.add(kind_of(edit))
        assert parse_edit(str(edit)) == edit
        assert apply(edit, picture_of(scene)) != picture_of(scene)
    assert kinds == set(KINDS)


@pytest.mark.parametrize(
    ("instruction", "before", "after"),
    [
        ("make the circle green", PAIR, replace(PAIR, things=(Thing("circle", "green"), PAIR.things[1]))),
        ("make the red circle green", PAIR, replace(PAIR, things=(Thing("circle", "green"), PAIR.things[1]))),
        ("remove the square", PAIR, replace(PAIR, things=PAIR.things[:1], places=PAIR.places[:1])),
        ("replace the word by FLUX", PAIR, replace(PAIR, word="FLUX")),
        ("remove the word", PAIR, replace(PAIR, word="")),
        ("add the word FLUX", LONE, replace(LONE, word="FLUX")),
        (
            "add a blue star left of the circle",
            LONE,
            replace(LONE, things=(*LONE.things, Thing("star", "blue")), places=((64, 54), (24, 54))),
        ),
        (
            "add a large orange heart below the circle",
            LONE,
            replace(LONE, things=(*LONE.things, Thing("heart", "orange", "large")), places=((64, 54), (64, 86))),
        ),
    ],
)
def test_an_instruction_changes_what_it_names_and_nothing_else(
    instruction: str, before: Picture, after: Picture
) -> None:
    assert apply(parse_edit(instruction), before) == after


@pytest.mark.parametrize(
    ("instruction", "picture", "says"),
    [
        ("remove the heart", PAIR, "0 things are called 'heart'; there are: a red circle, a blue square"),
        ("make the green circle pink", PAIR, "0 things are called 'green circle'"),
        ("add the word FLUX", PAIR, "'add the word FLUX' does not apply to a picture with the word 'HELLO'"),
        ("remove the word", LONE, "'remove the word' does not apply to a picture with the word ''"),
        ("add a blue square left of the circle", PAIR, r"no place left of the circle, which is at \(36, 54\)"),
    ],
)
def test_an_edit_that_does_not_apply_is_an_error(instruction: str, picture: Picture, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        apply(parse_edit(instruction), picture)


@pytest.mark.parametrize("text", ["", "make it green", "add a cat", "replace the word by no", "remove the red"])
def test_other_text_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an instruction of the sample's grammar: .* 'make the circle green'"):
        parse_edit(text)


def test_a_thing_is_named_with_its_colour_only_if_another_has_its_shape() -> None:
    twins = picture_of(parse("a red circle left of a blue circle"))
    assert [name_in(PAIR, index) for index in (0, 1)] == ["circle", "square"]
    assert [name_in(twins, index) for index in (0, 1)] == ["red circle", "blue circle"]


def test_added_things_are_in_places_of_the_grammar_and_do_not_touch_the_other_thing() -> None:
    rng = random.Random(2)
    radius = {"small": 9, "": 13, "large": 17}
    for _ in range(300):
        scene = random_scene(rng)
        edit = random_edit(rng, scene)
        if isinstance(edit, Add):
            (x, y), (u, v) = apply(edit, picture_of(scene)).places
            assert ((u, v),) in PLACES.values()
            assert max(abs(x - u), abs(y - v)) > radius[edit.thing.size] + radius[scene.things[0].size]


def test_the_judge_passes_true_results_and_only_those() -> None:
    rng = random.Random(5)
    for _ in range(60):
        scene = random_scene(rng, words=HELD_OUT_WORDS)
        before, edit = picture_of(scene), random_edit(rng, scene, HELD_OUT_WORDS)
        right = score_edit(edit, before, read(draw(apply(edit, before))))
        idle = score_edit(edit, before, read(draw(before)))
        assert (right.made, right.stayed) == (True, right.should_stay), (before, edit)
        assert (idle.made, idle.stayed) == (False, idle.should_stay), (before, edit)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (replace(PAIR, things=(Thing("circle", "green"), Thing("square", "blue", "large"))), EditScore(True, 5, 4)),
        (replace(PAIR, things=(Thing("heart", "green"), PAIR.things[1])), EditScore(True, 5, 4)),
        (replace(PAIR, things=(Thing("circle", "green"), PAIR.things[1]), word="OTHER"), EditScore(True, 5, 4)),
        (replace(PAIR, things=PAIR.things[1:], places=PAIR.places[1:]), EditScore(False, 5, 4)),
        (
            replace(PAIR, things=(*PAIR.things, Thing("cross", "pink")), places=(*PAIR.places, (64, 86))),
            EditScore(False, 5, 4),
        ),
    ],
)
def test_each_fault_costs_one_item_of_what_should_stay(result: Picture, expected: EditScore) -> None:
    assert score_edit(Recolour("circle", "green"), PAIR, read(draw(result))) == expected


def test_a_thing_that_moves_has_not_stayed() -> None:
    moved = replace(PAIR, places=(PAIR.places[0], (PAIR.places[1][0], PAIR.places[1][1] + 9)), word="FLUX")
    assert score_edit(SetWord("FLUX"), PAIR, read(draw(moved))) == EditScore(True, 4, 3)


def test_the_reference_may_be_known_from_its_image_alone() -> None:
    before = picture_from(read(draw(PAIR)))
    after = draw(apply(Remove("circle"), PAIR))
    assert score_edit(Remove("circle"), before, read(after)) == EditScore(True, 4, 4)
