"""Measure the two LoRAs with the judge, at half and full weight, alone and combined."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import Flux2KleinPipeline

from kit.sample.judge import Reading, read
from kit.sample.score import match, score, summary
from kit.sample.world import HELD_OUT_WORDS, UNSEEN_SHAPES, Scene, random_scene

from .loras import STYLES
from .pipeline import FIRST_SEED, generate

IMAGES = 60  # per trial
# kind of prompts, and the weights of the LoRAs
TRIALS: tuple[tuple[str, dict[str, float]], ...] = (
    ("stars", {}),
    ("stars", {"star": 0.5}),
    ("stars", {"star": 1.0}),
    ("shapes", {}),
    ("shapes", {"star": 1.0}),
    ("shapes", {"outline": 0.5}),
    ("shapes", {"outline": 1.0}),
    ("stars", {"star": 1.0, "outline": 1.0}),
)
LORA_TARGETS = {"star": ("stars", "shapes", 0.80), "outline": ("shapes", "outlined", 0.90)}  # prompts, metric, minimum


def prompts_of(kind: str, count: int) -> list[Scene]:
    """Return scenes of only stars, or of the shapes that the checkpoint knows; words are held out."""
    rng = random.Random(77)
    shapes = {"shapes": UNSEEN_SHAPES} if kind == "stars" else {}
    return [random_scene(rng, words=HELD_OUT_WORDS, **shapes) for _ in range(count)]


def outlined(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """Return the share of the requested things that are outlines, and of those that also have the right shape."""
    pairs = [
        (thing, seen)
        for scene, reading in zip(scenes, readings, strict=True)
        for thing, seen in zip(scene.things, match(scene, reading), strict=True)
    ]
    hollow = [(thing, seen) for thing, seen in pairs if seen is not None and seen.style == "outlined"]
    right = sum(thing.shape == seen.shape for thing, seen in hollow)
    return {"outlined": round(len(hollow) / len(pairs), 4), "outlined_and_right": round(right / len(pairs), 4)}


def lora_trials(pipe: Flux2KleinPipeline, folder: Path, count: int = IMAGES) -> list[dict[str, Any]]:
    """Generate and judge every trial; diffusers loads and unloads the LoRAs."""
    for name in STYLES:
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    rows = list[dict[str, Any]]()
    for kind, weights in TRIALS:
        if weights:
            pipe.enable_lora()
            pipe.set_adapters(list(weights), list(weights.values()))
        else:
            pipe.disable_lora()
        scenes = prompts_of(kind, count)
        seeds = [FIRST_SEED + index for index in range(count)]
        readings = [read(image) for image in generate(pipe, [scene.prompt() for scene in scenes], seeds)]
        found = summary(scenes, [score(*pair) for pair in zip(scenes, readings, strict=True)])
        rows.append({"prompts": kind, "weights": weights, **found, **outlined(scenes, readings)})
    pipe.unload_lora_weights()
    return rows


def lora_targets_met(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether each LoRA alone, at full weight, has its intended effect."""
    return all(
        row[key] >= least
        for name, (kind, key, least) in LORA_TARGETS.items()
        for row in rows
        if row["weights"] == {name: 1.0} and row["prompts"] == kind
    )
