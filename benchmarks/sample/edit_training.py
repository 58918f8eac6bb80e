"""Teach the transformer to edit: a reference image's tokens follow the image's tokens, as in the pipeline.

The text encoder stays as it is: its hidden states tell the words of an instruction apart, and the transformer learns
what they ask for. Images from text alone remain in every batch, so that the model does not forget them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from kit.sample.edits import Edit, Picture, apply, picture_of, random_edit
from kit.sample.world import Scene

from .denoiser_training import STAGES, flow_loss, pipeline_sigmas
from .latents import Examples, examples, patches, prompt_features, thing_weights
from .models import device
from .recipe import Stage, TrainingRecipe
from .trainer import Report, Run, cached, train

EDIT_STAGES = ("denoiser_edit", "denoiser_edit_long")


def training_edits(scenes: list[Scene], each: int, seed: int) -> list[Edit]:
    """Return ``each`` random edits of every scene, scene by scene."""
    rng = random.Random(seed)
    return [random_edit(rng, scene) for scene in scenes for _ in range(each)]


def changed_tokens(settled: Examples, edited: Examples) -> Tensor:
    """Return which image tokens [N, S] differ from the reference."""
    assert edited.sources is not None
    return (settled.tokens[edited.sources] - edited.tokens).abs().amax(-1) > 0.1


def edit_weights(before: Sequence[Picture], after: Sequence[Picture], changed: Tensor, factor: float) -> Tensor:
    """Return weights [N, S] of mean one: more at the things before and after, and ``factor`` times at changes.

    Most tokens are copied from the reference; without the factor the edit itself hardly affects the mean.
    """
    weights = torch.maximum(thing_weights(before), thing_weights(after)).to(changed.device)
    weights = weights * (1 + (factor - 1) * changed.float())
    return weights / weights.mean()


def edit_examples(
    pipe: Flux2KleinPipeline, scenes: list[Scene], settled: Examples, recipe: TrainingRecipe, work: Path
) -> list[Examples]:
    """Return the edits as training examples, one set of weights per stage; ``settled`` are the reference images."""
    edits = training_edits(scenes, recipe.edits, recipe.seed + 30)
    sources = torch.arange(len(scenes)).repeat_interleave(recipe.edits)
    after = [apply(edit, picture_of(scenes[source])) for edit, source in zip(edits, sources.tolist(), strict=True)]
    latents = cached(work / "edited.safetensors", lambda: patches(pipe.vae, after).cpu()).to(device())
    features = cached(
        work / "instructions.safetensors",
        lambda: prompt_features(pipe.text_encoder, pipe.tokenizer, [str(edit) for edit in edits]).cpu(),
    )
    made = examples(pipe.vae, features.to(device()), latents)
    made = replace(made, references=settled.tokens, sources=sources.to(device()))
    before = [picture_of(scenes[source]) for source in sources.tolist()]
    changed = changed_tokens(settled, made)
    return [replace(made, weights=edit_weights(before, after, changed, factor)) for factor in recipe.changed_weight]


def train_edits(
    pipe: Flux2KleinPipeline,
    scenes: list[Scene],
    settled: Examples,
    recipe: TrainingRecipe,
    folder: Path,
    report: Report | None = None,
) -> list[Run]:
    """Train the pipeline's transformer on edits of ``settled``, the images of ``scenes``, and on these images."""
    sigmas = pipeline_sigmas(settled.tokens.shape[1])
    pipe.transformer.train()
    runs = list[Run]()
    for name, edited in zip(EDIT_STAGES, edit_examples(pipe, scenes, settled, recipe, folder), strict=True):
        stage: Stage = getattr(recipe, name.removeprefix("denoiser_"))

        def loss_at(
            step: int,
            generator: torch.Generator,
            edited: Examples = edited,
            batch: int = stage.batch,
            edits: int = round(stage.batch * recipe.edit_share),
        ) -> Tensor:
            rows = torch.randint(len(edited.tokens), (edits,), generator=generator)
            loss = flow_loss(pipe.transformer, edited, rows, sigmas, generator) * edits
            rows = torch.randint(len(settled.tokens), (batch - edits,), generator=generator)
            loss = loss + flow_loss(pipe.transformer, settled, rows, sigmas, generator) * (batch - edits)
            return loss / batch

        seed = recipe.seed + 2 + len(STAGES) + len(runs)
        runs.append(train(name, stage, pipe.transformer, loss_at, folder, seed, report))
    pipe.transformer.eval()
    return runs
