"""Measure how well a checkpoint edits: held-out instructions on drawings of held-out words, judged by the judge."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from numpy.typing import NDArray
from PIL import Image

from kit.sample.draw import draw
from kit.sample.edit_score import EditScore, score_edit
from kit.sample.edits import KINDS, Edit, Picture, apply, kind_of, picture_of, random_edit
from kit.sample.judge import read
from kit.sample.world import HELD_OUT_WORDS, SIDE, Scene, random_scene

from .denoiser_training import STEPS

EDITS = 200
EDIT_TARGETS = {"made": 0.90, "stayed": 0.95}
CONFIDENCE = 0.95
FIRST_SEED = 3000  # edit i uses seed FIRST_SEED + i


@dataclass(frozen=True)
class Trial:
    """An instruction and the content of its reference image."""

    before: Picture
    edit: Edit


def held_out_edits(count: int, trained: Iterable[Scene], seed: int = 2027) -> list[Trial]:
    """Return edits of scenes that no training scene equals, with words that were never used in training."""
    seen, rng, trials = set(trained), random.Random(seed), list[Trial]()
    while len(trials) < count:
        scene = random_scene(rng, words=HELD_OUT_WORDS)
        trial = Trial(picture_of(scene), random_edit(rng, scene, HELD_OUT_WORDS))
        if scene not in seen and trial not in trials:
            trials.append(trial)
    return trials


def paint_edits(pipe: Flux2KleinPipeline, trials: Sequence[Trial]) -> Iterator[NDArray[np.uint8]]:
    """Yield one edited image [SIDE, SIDE, 3] per trial; the pipeline shares references in a batch, so one at a time."""
    for index, trial in enumerate(trials):
        image = pipe(
            image=Image.fromarray(draw(trial.before)),
            prompt=str(trial.edit),
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(FIRST_SEED + index),
            max_sequence_length=pipe.tokenizer.model_max_length,
            output_type="np",
        ).images[0]
        yield (image * 255).round().astype(np.uint8)


def share(right: int, of: int) -> dict[str, float | int]:
    """Return a share with its Wilson interval of 95 %."""
    from scipy.stats import binomtest

    ends = binomtest(right, of).proportion_ci(CONFIDENCE, method="wilson")
    return {"share": round(right / of, 4), "low": round(ends.low, 4), "high": round(ends.high, 4), "of": of}


def edit_summary(trials: Sequence[Trial], scores: Sequence[EditScore]) -> dict[str, Any]:
    """Combine scores into shares: edits made, items that stayed, and images in which everything stayed."""
    rows = list(zip(trials, scores, strict=True))

    def shares(chosen: list[EditScore]) -> dict[str, Any]:
        return {
            "made": share(sum(one.made for one in chosen), len(chosen)),
            "stayed": share(sum(one.stayed for one in chosen), sum(one.should_stay for one in chosen)),
            "all_stayed": share(sum(one.stayed == one.should_stay for one in chosen), len(chosen)),
        }

    kinds = {kind: [one for trial, one in rows if kind_of(trial.edit) == kind] for kind in KINDS}
    return shares(list(scores)) | {"kinds": {kind: shares(chosen) for kind, chosen in kinds.items() if chosen}}


def edit_quality(pipe: Flux2KleinPipeline, trials: Sequence[Trial]) -> dict[str, Any]:
    """Edit and judge one image per trial."""
    images = paint_edits(pipe, trials)
    return edit_summary(trials, [_judged(trial, image) for trial, image in zip(trials, images, strict=True)])


def _judged(trial: Trial, image: NDArray[np.uint8]) -> EditScore:
    return score_edit(trial.edit, trial.before, read(image))


def judge_edit_drawings(trials: Sequence[Trial]) -> dict[str, Any]:
    """Measure the judge on exact drawings of the results, the ceiling, and on unedited drawings, the floor."""

    def judged(picture: Callable[[Trial], Picture]) -> dict[str, Any]:
        return edit_summary(trials, [_judged(trial, draw(picture(trial))) for trial in trials])

    return {
        "true_results": judged(lambda trial: apply(trial.edit, trial.before)),
        "unedited": judged(lambda trial: trial.before),
    }


def edit_targets_met(found: dict[str, Any]) -> bool:
    """Return whether edits are made and the rest stays, as often as is required."""
    return all(found[name]["share"] >= least for name, least in EDIT_TARGETS.items())
