"""The metrics of the LoRA trials, on exact drawings."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.sample.lora_trials import LORA_TARGETS, TRIALS, lora_targets_met, outlined, prompts_of
from kit.sample.draw import draw
from kit.sample.judge import read
from kit.sample.world import HELD_OUT_WORDS, SHAPES


def test_prompts_of_stars_ask_for_nothing_else_and_words_are_held_out() -> None:
    assert {thing.shape for scene in prompts_of("stars", 40) for thing in scene.things} == {"star"}
    shapes = prompts_of("shapes", 40)
    assert {thing.shape for scene in shapes for thing in scene.things} == set(SHAPES)
    assert {scene.word for scene in shapes} <= {"", *HELD_OUT_WORDS}
    assert prompts_of("shapes", 40) == shapes


def test_outlines_are_counted_among_the_things_asked_for() -> None:
    scenes, rng = prompts_of("stars", 30), random.Random(1)
    hollow = [read(draw(scene, rng, "outlined")) for scene in scenes]
    filled = [read(draw(scene, rng)) for scene in scenes]
    assert outlined(scenes, hollow) == {"outlined": 1.0, "outlined_and_right": 1.0}
    assert outlined(scenes, filled) == {"outlined": 0.0, "outlined_and_right": 0.0}
    things = [len(scene.things) for scene in scenes]
    share = pytest.approx(sum(things[:10]) / sum(things), abs=1e-4)
    assert outlined(scenes, [*hollow[:10], *filled[10:]])["outlined"] == share
    circles = prompts_of("shapes", 30)
    assert outlined(circles, hollow)["outlined_and_right"] == 0.0  # outlines, but stars


def _rows(star: float, outline: float) -> list[dict[str, Any]]:
    return [
        {"prompts": kind, "weights": weights, "shapes": star if kind == "stars" else 0.0, "outlined": outline}
        for kind, weights in TRIALS
    ]


def test_targets_are_met_by_each_lora_alone_at_full_weight() -> None:
    (_, _, star), (_, _, outline) = LORA_TARGETS["star"], LORA_TARGETS["outline"]
    assert lora_targets_met(_rows(star, outline))
    assert not lora_targets_met(_rows(star - 0.01, outline))
    assert not lora_targets_met(_rows(star, outline - 0.01))
