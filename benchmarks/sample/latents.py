"""Convert images to the transformer's inputs: latents in patches, normalized by statistics of the data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from kit.sample.draw import Style, draw
from kit.sample.edits import Picture
from kit.sample.world import CELL, SIDE, SIZES, Scene

from .models import half
from .text_training import encode
from .vae_training import to_model


@dataclass(frozen=True)
class Examples:
    """Images and sentences as the transformer's training inputs."""

    tokens: Tensor  # [N, S, 128] image tokens, normalized
    features: Tensor  # [N, T, 3H] of the prompts
    image_ids: Tensor  # [S, 4]
    text_ids: Tensor  # [T, 4]
    weights: Tensor | None = None  # [N, S] weight of the error at each token; None: uniform
    references: Tensor | None = (
        None  # [M, S, 128] tokens of reference images; None: the images are made from text alone
    )
    sources: Tensor | None = None  # [N] row in ``references`` of each example's reference image


def token_weights(scenes: Sequence[Scene | Picture]) -> Tensor:
    """Return ``thing_weights`` scaled to a mean of one.

    Two tokens in three are plain background; with uniform weights, the corners of a small cross hardly affect the mean.
    """
    weights = thing_weights(scenes)
    return weights / weights.mean()


def thing_weights(scenes: Sequence[Scene | Picture]) -> Tensor:
    """Return weights [N, S]: one for the background, more for a thing, most for a small thing."""
    side = SIDE // CELL
    weights = torch.ones(len(scenes), side, side)
    for weight, scene in zip(weights, scenes, strict=True):
        for thing, (x, y) in zip(scene.things, scene.centres(), strict=True):
            radius = SIZES[thing.size]
            rows, columns = (slice(int(c - radius) // CELL, int(c + radius) // CELL + 1) for c in (y, x))
            weight[rows, columns] = 1 + 4 * SIZES["small"] / radius
    return weights.flatten(1)


@torch.no_grad()
def patches(
    vae: AutoencoderKLFlux2, scenes: Sequence[Scene | Picture], tremble: int | None = None, style: Style = "filled"
) -> Tensor:
    """Draw and encode scenes to patchified latents [N, 128, h, w]; ``tremble`` seeds the jitter, None disables it."""
    rng = None if tremble is None else random.Random(tremble)
    where = next(vae.parameters()).device
    made = []
    for first in range(0, len(scenes), 64):
        drawn = np.stack([draw(scene, rng, style) for scene in scenes[first : first + 64]])
        with half():
            latents = vae.encode(to_model(torch.from_numpy(drawn).permute(0, 3, 1, 2)).to(where)).latent_dist.mode()
        made.append(Flux2KleinPipeline._patchify_latents(latents.float()))
    return torch.cat(made)


def set_statistics(vae: AutoencoderKLFlux2, latents: Tensor) -> None:
    """Store mean and variance of each of the 128 channels where the pipeline expects them."""
    vae.bn.running_mean.copy_(latents.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(latents.var(dim=(0, 2, 3)))


def normalised(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Return image tokens [N, S, 128] of zero mean and unit variance."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    packed: Tensor = Flux2KleinPipeline._pack_latents((latents - mean) / deviation)
    return packed


def prompts(scenes: Sequence[Scene]) -> list[str]:
    """Return the sentences of scenes."""
    return [scene.prompt() for scene in scenes]


@torch.no_grad()
def prompt_features(encoder: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """Return the features [N, T, 3H] of prompts, in half precision to save memory."""
    return torch.cat([encode(encoder, tokenizer, prompts[i : i + 64]).bfloat16() for i in range(0, len(prompts), 64)])


def examples(vae: AutoencoderKLFlux2, features: Tensor, latents: Tensor) -> Examples:
    """Pair prompt features with the image tokens of latents, and add position ids as the pipeline does."""
    return Examples(
        tokens=normalised(vae, latents),
        features=features,
        image_ids=Flux2KleinPipeline._prepare_latent_ids(latents[:1])[0],
        text_ids=Flux2KleinPipeline._prepare_text_ids(features[:1])[0],
    )
