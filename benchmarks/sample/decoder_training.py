"""Train only the decoder, so that the latents and therefore the transformer's training stay valid."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from kit.sample.draw import draw
from kit.sample.world import BACKGROUNDS, SHAPES, SIDE, UNSEEN_SHAPES, Scene, Thing, random_scene

from .recipe import TrainingRecipe
from .trainer import Report, Run, train
from .vae_training import STYLES, TrainingImages, crowds, images, to_model, vae_loss

# A cross has inward corners and a star has ten corners: a soft decoder turns both into a diamond or a circle.
OFTEN = (*SHAPES, *UNSEEN_SHAPES, "cross", "cross", "star", "star")
FAINT = ("gray", "gray", "gray", "brown", "white", "black")  # the decoder blurs where contrast is low


def polish_decoder(
    vae: AutoencoderKLFlux2, recipe: TrainingRecipe, folder: Path, report: Report | None = None
) -> list[Run]:
    """Train the decoder to tolerate the transformer's errors, with stronger noise than before."""
    eighth, seed = recipe.images // 8, recipe.seed + 12
    drawn = torch.cat([images(2 * eighth, seed), crowds(eighth // 2, SIDE, seed)])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(drawn), (recipe.vae_polish.batch,), generator=generator)
        wanted = to_model(drawn[rows]).to(next(vae.parameters()).device)
        return vae_loss(vae, wanted, recipe.polish_noise, generator)

    open_decoder(vae)
    run = train("vae_polish", recipe.vae_polish, vae, loss_at, folder, recipe.seed, report)
    vae.eval().requires_grad_(True)
    return [run]


def sharpen_decoder(
    vae: AutoencoderKLFlux2, recipe: TrainingRecipe, folder: Path, report: Report | None = None
) -> list[Run]:
    """Train the decoder on small shapes, inward corners and outlines, then on the same with low contrast.

    The noise ranges from zero to that of the polish stage, so that the decoder learns to be sharp and tolerant.
    """
    stages = (("vae_sharp", recipe.vae_sharp, tuple(BACKGROUNDS)), ("vae_faint", recipe.vae_faint, FAINT))
    runs = []
    open_decoder(vae)
    for index, (name, stage, backgrounds) in enumerate(stages):
        drawn = hard_images(recipe.hard_images, recipe.seed + 13 + index, backgrounds)

        def loss_at(
            step: int,
            generator: torch.Generator,
            drawn: TrainingImages = drawn,
            batch: int = stage.batch,
            faint: bool = backgrounds is FAINT,
        ) -> Tensor:
            rows = torch.randint(len(drawn), (batch,), generator=generator)
            noise = recipe.polish_noise * torch.rand(len(rows), 1, 1, 1, generator=generator)
            where = next(vae.parameters()).device
            return vae_loss(vae, to_model(drawn[rows]).to(where), noise.to(where), generator, faint)

        runs.append(train(name, stage, vae, loss_at, folder, recipe.seed + index, report))
    vae.eval().requires_grad_(True)
    return runs


def open_decoder(vae: AutoencoderKLFlux2) -> None:
    """Make only the decoder trainable."""
    vae.train().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)


def hard_images(count: int, seed: int, backgrounds: Sequence[str]) -> TrainingImages:
    """Draw scenes with more crosses, stars and small things than usual, four in ten of them in outlines."""
    rng = random.Random(seed)

    def harder(scene: Scene) -> Scene:
        things = (Thing(rng.choice(OFTEN), thing.colour, rng.choice(("small", thing.size))) for thing in scene.things)
        return Scene(tuple(things), scene.layout, rng.choice(backgrounds), scene.word)

    drawn = [draw(harder(random_scene(rng)), rng, rng.choice((*STYLES, "outlined"))) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
