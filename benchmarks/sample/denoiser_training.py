"""Train the transformer by flow matching, at the noise levels of the pipeline's four steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from kit.sample.world import Scene, random_scene

from .attention import plain_attention
from .latents import Examples
from .models import build_scheduler, half
from .recipe import Stage, TrainingRecipe
from .trainer import Report, Run, train

STEPS = 4
STAGES = ("denoiser", "denoiser_long", "denoiser_settle", "denoiser_finish", "denoiser_last", "denoiser_hard")
TREMBLING, LAST = STAGES[:2], STAGES[4:]  # stages on jittered drawings; stages that continue a finished checkpoint


def training_scenes(count: int, seed: int) -> list[Scene]:
    """Return random scenes without the unseen shapes and the held-out words."""
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def pipeline_sigmas(image_tokens: int) -> Tensor:
    """Return the noise levels at which the pipeline calls the transformer in four steps, in decreasing order from 1."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=compute_empirical_mu(image_tokens, STEPS))
    return torch.as_tensor(scheduler.sigmas[:-1], dtype=torch.float32)


def noise_levels(batch: int, sigmas: Tensor, own: float, generator: torch.Generator) -> Tensor:
    """Draw a share ``own`` of the levels from the pipeline's four, and the rest from one shifted to noise."""
    named = sigmas[torch.randint(len(sigmas), (batch,), generator=generator)]
    even = torch.rand(batch, generator=generator)
    anywhere = 3 * even / (1 + 2 * even)
    return torch.where(torch.rand(batch, generator=generator) < own, named, anywhere)


def reference_ids(image_ids: Tensor) -> Tensor:
    """Return the position ids [S, 4] of one reference of the image's size: as the image's, at the pipeline's time."""
    side = round(len(image_ids) ** 0.5)
    ids: Tensor = Flux2KleinPipeline._prepare_image_ids([image_ids.new_zeros(1, 1, side, side)])[0]
    return ids.to(image_ids)


def flow_loss(
    transformer: Flux2Transformer2DModel,
    data: Examples,
    rows: Tensor,
    sigmas: Tensor,
    generator: torch.Generator,
    own: float = 0.8,
) -> Tensor:
    """Return the weighted mean squared error of the velocity ``noise - x0`` at ``x = (1 - s) x0 + s noise``."""
    where = data.tokens.device
    clean = data.tokens[rows]  # [B, S, 128]
    noise = torch.randn(clean.shape, generator=generator).to(where)
    level = noise_levels(len(rows), sigmas, own, generator).to(where)
    mixed = torch.lerp(clean, noise, level[:, None, None])
    ids = data.image_ids
    if data.references is not None and data.sources is not None:
        mixed = torch.cat([mixed, data.references[data.sources[rows]]], dim=1)
        ids = torch.cat([ids, reference_ids(ids)])
    with half(), plain_attention():
        velocity = transformer(
            hidden_states=mixed,
            encoder_hidden_states=data.features[rows].float(),
            timestep=level,
            img_ids=ids,
            txt_ids=data.text_ids,
        ).sample
    velocity = velocity[:, : clean.shape[1]]  # the reference tokens have no velocity
    error = (velocity.float() - (noise - clean)).square().mean(-1)  # [B, S]
    loss: Tensor = (error if data.weights is None else error * data.weights[rows]).mean()
    return loss


def hard_rows(scenes: list[Scene]) -> Tensor:
    """Return the indices of the scenes with a small cross."""
    hard = [("small", "cross") in [(thing.size, thing.shape) for thing in scene.things] for scene in scenes]
    return torch.tensor(hard).nonzero().flatten()


def mixed_rows(batch: int, count: int, hard: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw random examples, a share of them from the hard ones."""
    rows = torch.randint(count, (batch,), generator=generator)
    if not share or not len(hard):
        return rows
    chosen = hard[torch.randint(len(hard), (batch,), generator=generator)]
    return torch.where(torch.rand(batch, generator=generator) < share, chosen, rows)


def train_denoiser(
    transformer: Flux2Transformer2DModel,
    trembling: Examples,
    settled: Examples,
    hard: Tensor,
    recipe: TrainingRecipe,
    folder: Path,
    report: Report | None = None,
    names: Sequence[str] = STAGES,
) -> list[Run]:
    """Train the transformer: two stages on jittered drawings, the others on exact ones, the last on hard ones.

    If a prompt leaves the position of a thing open by two pixels, four sampling steps generate the mean of all
    positions, a blur. Jitter teaches early that positions vary; sharp edges need images that the prompt determines.
    """
    sigmas = pipeline_sigmas(settled.tokens.shape[1])
    transformer.train()
    runs = []
    for name in names:
        stage: Stage = getattr(recipe, name)
        index = STAGES.index(name)

        def loss_at(
            step: int,
            generator: torch.Generator,
            batch: int = stage.batch,
            data: Examples = trembling if name in TREMBLING else settled,
            share: float = recipe.hard_share if name == STAGES[-1] else 0.0,
            own: float = recipe.own_levels[index],
        ) -> Tensor:
            rows = mixed_rows(batch, len(data.tokens), hard, share, generator)
            return flow_loss(transformer, data, rows, sigmas, generator, own)

        runs.append(train(name, stage, transformer, loss_at, folder, recipe.seed + 2 + index, report))
    transformer.eval()
    return runs
