"""Train the sample's two LoRAs: a shape that the checkpoint has never generated, and a style."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from kit.sample.draw import Style
from kit.sample.world import SHAPES, UNSEEN_SHAPES, Scene, random_scene

from .denoiser_training import flow_loss, pipeline_sigmas
from .latents import examples, patches, prompt_features, prompts, token_weights
from .models import device
from .pipeline import load
from .recipe import TrainingRecipe
from .trainer import Report, Run, train

STYLES: dict[str, Style] = {"star": "filled", "outline": "outlined"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = (*ATTENTION, "linear_in", "linear_out", "to_qkv_mlp_proj")


def lora_scenes(name: str, count: int, seed: int) -> list[Scene]:
    """Return the training scenes of a LoRA: stars among other things, or any scenes, to be drawn in outlines."""
    rng = random.Random(seed)
    if name == "outline":
        return [random_scene(rng) for _ in range(count)]
    scenes = []
    for index in range(count):
        scene = random_scene(rng)
        if index % 4:  # three in four scenes have only stars, the rest preserve the other shapes
            scene = replace(scene, things=tuple(replace(thing, shape=UNSEEN_SHAPES[0]) for thing in scene.things))
        scenes.append(scene)
    assert all(thing.shape in SHAPES + UNSEEN_SHAPES for scene in scenes for thing in scene.things)
    return scenes


def train_lora(
    name: str, checkpoint: Path, out: Path, recipe: TrainingRecipe, folder: Path, report: Report | None = None
) -> Run:
    """Train one LoRA on the shipped checkpoint and save it in bfloat16 in diffusers' format."""
    if name not in STYLES:
        raise ValueError(f"unknown LoRA {name!r}; there are: {', '.join(STYLES)}")
    pipe = load(checkpoint)
    scenes = lora_scenes(name, recipe.lora_scenes, recipe.seed + 40)
    latents = patches(pipe.vae, scenes, style=STYLES[name])
    data = examples(pipe.vae, prompt_features(pipe.text_encoder, pipe.tokenizer, prompts(scenes)), latents)
    data = replace(data, weights=token_weights(scenes).to(device()))
    transformer = pipe.transformer
    transformer.requires_grad_(False)
    torch.manual_seed(recipe.seed + 41)
    targets = [*TARGETS, *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(recipe.single_blocks))]
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_rank,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    transformer.add_adapter(config)
    transformer.to(device())
    sigmas = pipeline_sigmas(data.tokens.shape[1])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(scenes), (recipe.lora.batch,), generator=generator)
        return flow_loss(transformer, data, rows, sigmas, generator)

    transformer.train()
    run = train(f"lora_{name}", recipe.lora, transformer, loss_at, folder, recipe.seed, report)
    layers = {key: value.bfloat16() for key, value in get_peft_model_state_dict(transformer).items()}
    Flux2KleinPipeline.save_lora_weights(
        out,
        transformer_lora_layers=layers,
        weight_name=f"{name}.safetensors",
        safe_serialization=True,
        transformer_lora_adapter_metadata=config.to_dict() | {"target_modules": sorted(targets)},  # a set has no order
    )
    return run
