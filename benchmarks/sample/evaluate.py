"""Measure the shipped checkpoint with judged images of held-out prompts and edits, and the effect of its LoRAs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import Flux2KleinPipeline

from kit.sample.draw import draw
from kit.sample.judge import read
from kit.sample.score import score, summary
from kit.sample.world import HELD_OUT_WORDS, SHAPES, UNSEEN_SHAPES, Scene, parse, random_scene

from .edit_trials import EDIT_TARGETS, EDITS, edit_quality, edit_targets_met, held_out_edits, judge_edit_drawings
from .lora_trials import LORA_TARGETS, lora_targets_met, lora_trials
from .pipeline import FIRST_SEED, generate, load

TARGETS = {"shapes": 0.95, "colours": 0.95, "positions": 0.90, "words": 0.80}
PROMPTS = 300


def held_out_scenes(count: int, trained: Iterable[Scene], seed: int = 2026) -> list[Scene]:
    """Return scenes that no training scene equals and whose words were never used in training."""
    seen, rng, scenes = set(trained), random.Random(seed), list[Scene]()
    while len(scenes) < count:
        scene = random_scene(rng, words=HELD_OUT_WORDS)
        bare = Scene(scene.things, scene.layout, scene.background)
        if scene not in seen and bare not in seen and scene not in scenes:
            scenes.append(scene)
    return scenes


def judge_drawings(count: int = 1000, seed: int = 11) -> dict[str, float | int]:
    """Measure the judge itself on exact drawings of every shape in both styles: the ceiling of the other numbers."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, SHAPES + UNSEEN_SHAPES) for _ in range(count)]
    scores = [score(scene, read(draw(scene, rng, rng.choice(("filled", "outlined"))))) for scene in scenes]
    return summary(scenes, scores)


def quality(pipe: Flux2KleinPipeline, scenes: list[Scene], steps: int) -> dict[str, float | int]:
    """Generate and judge one image per scene."""
    seeds = [FIRST_SEED + index for index in range(len(scenes))]
    images = generate(pipe, [scene.prompt() for scene in scenes], seeds, steps)
    return summary(scenes, [score(scene, read(image)) for scene, image in zip(scenes, images, strict=True)])


def evaluate(
    checkpoint: Path, loras: Path, trained: Iterable[Scene], prompts: int = PROMPTS, edits: int = EDITS
) -> dict[str, Any]:
    """Measure everything; ``passed`` is true if every target is met."""
    pipe, trained = load(checkpoint), set(trained)
    scenes = held_out_scenes(prompts, trained)
    for scene in scenes:
        assert parse(scene.prompt()) == scene
    found = quality(pipe, scenes, 4)
    edited = held_out_edits(edits, trained)
    edit_found = edit_quality(pipe, edited)
    trials = lora_trials(pipe, loras)
    quality_met = all(found[name] >= least for name, least in TARGETS.items())
    return {
        "quality": found,
        "edits": edit_found,
        "targets": TARGETS,
        "edit_targets": EDIT_TARGETS,
        "lora_targets": LORA_TARGETS,
        "passed": quality_met and edit_targets_met(edit_found) and lora_targets_met(trials),
        "judge_on_true_drawings": judge_drawings(),
        "judge_on_true_edits": judge_edit_drawings(edited),
        "loras": trials,
    }
