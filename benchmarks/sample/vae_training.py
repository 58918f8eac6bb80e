"""Train the image encoder and decoder for accurate flat colours and strokes two pixels wide."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kit.sample.draw import Style, coverage, draw, letter_cell
from kit.sample.world import ALPHABET, BACKGROUNDS, CELL, COLOURS, SHAPES, SIDE, UNSEEN_SHAPES, random_scene

from .models import LATENTS, half
from .recipe import TrainingRecipe
from .trainer import Report, Run, train

TrainingImages = Tensor  # [N, 3, H, W] uint8
STYLES: tuple[Style, ...] = ("filled", "filled", "filled", "outlined")


def crowd(rng: random.Random, side: int) -> NDArray[np.uint8]:
    """Draw a crowded crop: many shapes and letters, half of them in the world's colours, half in random ones.

    The world's own images are nearly empty; a codec learns colours and strokes from them many times more slowly.
    """

    def colour(names: dict[str, tuple[int, int, int]]) -> tuple[int, ...]:
        if rng.random() < 0.7:
            return rng.choice(list(names.values()))
        return tuple(rng.randint(0, 255) for _ in range(3))

    image = np.empty((side, side, 3))
    image[:] = colour(BACKGROUNDS)
    for _ in range(rng.randint(2, 6)):
        shape, style = rng.choice(SHAPES + UNSEEN_SHAPES), rng.choice(STYLES)
        centre = (rng.uniform(0, side), rng.uniform(0, side))
        alpha = coverage(shape, centre, rng.uniform(8, 20), style, side)[..., None]
        image = (1 - alpha) * image + alpha * np.array(colour(COLOURS))
    for _ in range(rng.randint(0, 2)):
        top, shade = CELL * rng.randrange(side // CELL), colour(BACKGROUNDS)
        cells = rng.sample(range(side // CELL), rng.randint(1, side // CELL))
        for left in (CELL * cell for cell in cells):
            image[top : top + CELL, left : left + CELL][letter_cell(rng.choice(ALPHABET))] = shade
    return image.round().astype(np.uint8)


def crowds(count: int, side: int, seed: int) -> TrainingImages:
    """Draw many crowded crops."""
    rng = random.Random(seed)
    drawn = np.stack([crowd(rng, side) for _ in range(count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def images(count: int, seed: int) -> TrainingImages:
    """Draw random scenes of every shape, a quarter of them outlined: a codec should cover more than the denoiser."""
    rng = random.Random(seed)
    drawn = [draw(random_scene(rng, SHAPES + UNSEEN_SHAPES), rng, rng.choice(STYLES)) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def to_model(image: Tensor) -> Tensor:
    """Map bytes to the models' range, -1 to 1."""
    return image.float() / 127.5 - 1


def image_loss(made: Tensor, wanted: Tensor, faint: bool = False) -> Tensor:
    """Weigh strokes and edges more than flat areas, and compare colours also on 8 x 8 means, which show hue errors.

    With ``faint``, an edge of low contrast, as most are on gray, weighs as much as one between black and white.
    """
    smooth = functional.avg_pool2d(functional.pad(wanted, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    edge = (wanted - smooth).abs().amax(dim=1, keepdim=True)  # [B, 1, H, W]
    weight = 1 + (6 * (4 * edge).clamp(max=1) if faint else 4 * edge)
    difference = made - wanted
    mean = functional.avg_pool2d(difference, 8)
    fine = (weight * (difference.abs() + difference.square())).mean()
    loss: Tensor = fine + 2 * mean.abs().mean() + 4 * mean.square().mean()
    return loss


def vae_loss(
    vae: AutoencoderKLFlux2, wanted: Tensor, noise: float | Tensor, generator: torch.Generator, faint: bool = False
) -> Tensor:
    """Encode, add a little noise to the latents, decode and compare.

    ``noise`` is relative to a channel's deviation: one value for all images, or one for each, [B, 1, 1, 1].
    """
    with half(), torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
        latents = vae.encode(wanted).latent_dist.mode()
    latents = latents.float()
    deviation = latents.detach().std(dim=(0, 2, 3), keepdim=True)
    disturbed = latents + noise * deviation * torch.randn(latents.shape, generator=generator).to(latents.device)
    with half():
        made = vae.decode(disturbed).sample
    size: Tensor = latents.square().mean()
    return image_loss(made.float(), wanted, faint) + 1e-4 * size


def train_vae(vae: AutoencoderKLFlux2, recipe: TrainingRecipe, folder: Path, report: Report | None = None) -> list[Run]:
    """Train on crops, then on whole images; the encoder's variance, which is never sampled, is set to a constant."""
    crowded = crowds(recipe.images, recipe.crop, recipe.seed + 10)
    whole_seed, eighth = recipe.seed + 11, recipe.images // 8
    drawn = torch.cat([images(eighth, whole_seed), crowds(eighth, SIDE, whole_seed)])
    where = next(vae.parameters()).device

    def pieces(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(crowded), (recipe.vae.batch,), generator=generator)
        return vae_loss(vae, to_model(crowded[rows]).to(where), recipe.latent_noise, generator)

    def whole(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(drawn), (recipe.vae_whole.batch,), generator=generator)
        return vae_loss(vae, to_model(drawn[rows]).to(where), recipe.latent_noise, generator)

    vae.train()
    runs = [train("vae", recipe.vae, vae, pieces, folder, recipe.seed, report)]
    runs.append(train("vae_whole", recipe.vae_whole, vae, whole, folder, recipe.seed + 1, report))
    with torch.no_grad():
        vae.quant_conv.weight[LATENTS:] = 0
        vae.quant_conv.bias[LATENTS:] = -6
    vae.eval()
    return runs
