"""Measure the checkpoint as it ships: held-out prompts, four steps, judged; and what the two LoRAs change."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import Flux2KleinPipeline
from numpy.typing import NDArray

from kit.sample.draw import draw
from kit.sample.judge import read
from kit.sample.score import Score, score
from kit.sample.world import HELD_OUT_WORDS, SHAPES, UNSEEN_SHAPES, Scene, parse, random_scene

from .pipeline import load, paint

TARGETS = {"shapes": 0.95, "colours": 0.95, "positions": 0.90, "words": 0.80}
PROMPTS = 300
FIRST_SEED = 1000  # picture i is made from seed FIRST_SEED + i


def held_out_scenes(count: int, trained: Iterable[Scene], seed: int = 2026) -> list[Scene]:
    """Return scenes that no training scene equals; their words are words that training never spelled."""
    seen, rng, scenes = set(trained), random.Random(seed), list[Scene]()
    while len(scenes) < count:
        scene = random_scene(rng, words=HELD_OUT_WORDS)
        bare = Scene(scene.things, scene.layout, scene.background)
        if scene not in seen and bare not in seen and scene not in scenes:
            scenes.append(scene)
    return scenes


def summary(scenes: list[Scene], scores: list[Score]) -> dict[str, float | int]:
    """Add scores up to shares."""
    things = sum(one.things for one in scores)
    worded = [one for scene, one in zip(scenes, scores, strict=True) if scene.word]
    wordless = [one for scene, one in zip(scenes, scores, strict=True) if not scene.word]

    def share(right: int, of: int) -> float:
        return round(right / of, 4) if of else 1.0

    return {
        "pictures": len(scores),
        "things": things,
        "shapes": share(sum(one.shapes for one in scores), things),
        "colours": share(sum(one.colours for one in scores), things),
        "sizes": share(sum(one.sizes for one in scores), things),
        "counts": share(sum(one.exact for one in scores), len(scores)),
        "positions": share(sum(one.position for one in scores), len(scores)),
        "backgrounds": share(sum(one.background for one in scores), len(scores)),
        "words_asked": len(worded),
        "words": share(sum(one.word for one in worded), len(worded)),
        "no_word_where_none_was_asked": share(sum(one.word for one in wordless), len(wordless)),
    }


def judge_drawings(count: int = 1000, seed: int = 11) -> dict[str, float | int]:
    """Measure the judge itself on true drawings of every shape in both styles: the ceiling of the other numbers."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, SHAPES + UNSEEN_SHAPES) for _ in range(count)]
    scores = [score(scene, read(draw(scene, rng, rng.choice(("filled", "outlined"))))) for scene in scenes]
    return summary(scenes, scores)


def quality(pipe: Flux2KleinPipeline, scenes: list[Scene], steps: int) -> dict[str, float | int]:
    """Make and judge one picture per scene."""
    seeds = [FIRST_SEED + index for index in range(len(scenes))]
    pictures = paint(pipe, [scene.prompt() for scene in scenes], seeds, steps)
    return summary(scenes, [score(scene, read(picture)) for scene, picture in zip(scenes, pictures, strict=True)])


def lora_effect(pipe: Flux2KleinPipeline, folder: Path, count: int = 60) -> dict[str, dict[str, float]]:
    """Measure both LoRAs: the share of star prompts that show a star, and of things that are outlines."""
    rng = random.Random(77)
    stars = [random_scene(rng, UNSEEN_SHAPES) for _ in range(count)]
    plain = [random_scene(rng, words=HELD_OUT_WORDS) for _ in range(count)]
    seeds = [FIRST_SEED + index for index in range(count)]

    def star_share() -> float:
        return summary(stars, [score(s, read(p)) for s, p in zip(stars, _paint(pipe, stars, seeds), strict=True)])[
            "shapes"
        ]

    def outline_share() -> float:
        things = [thing for picture in _paint(pipe, plain, seeds) for thing in read(picture).things]
        return round(sum(thing.style == "outlined" for thing in things) / max(1, len(things)), 4)

    effect = {"star": {"without": star_share()}, "outline": {"without": outline_share()}}
    for name, measure in (("star", star_share), ("outline", outline_share)):
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
        effect[name]["with"] = measure()
        if name == "outline":  # what the style must leave alone
            effect[name] |= {f"{key}_with": value for key, value in quality(pipe, plain, 4).items() if key in TARGETS}
        pipe.unload_lora_weights()
    return effect


def _paint(pipe: Flux2KleinPipeline, scenes: list[Scene], seeds: list[int]) -> list[NDArray[np.uint8]]:
    return list(paint(pipe, [scene.prompt() for scene in scenes], seeds))


def evaluate(checkpoint: Path, loras: Path, trained: Iterable[Scene], prompts: int = PROMPTS) -> dict[str, Any]:
    """Measure everything; ``passed`` tells whether every target is met."""
    pipe = load(checkpoint)
    scenes = held_out_scenes(prompts, trained)
    for scene in scenes:
        assert parse(scene.prompt()) == scene
    found = quality(pipe, scenes, 4)
    return {
        "quality": found,
        "targets": TARGETS,
        "passed": all(found[name] >= least for name, least in TARGETS.items()),
        "judge_on_true_drawings": judge_drawings(),
        "loras": lora_effect(pipe, loras),
    }
