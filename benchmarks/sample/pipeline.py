"""Assemble the sample's parts as a pipeline, write it in bfloat16, and generate images with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from kit.own_settings import OwnSettings
from kit.sample.world import SIDE

from .denoiser_training import STEPS
from .models import build_scheduler, device

FIRST_SEED = 1000  # image i of a measurement uses seed FIRST_SEED + i


def assemble(
    vae: AutoencoderKLFlux2,
    encoder: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    transformer: Flux2Transformer2DModel,
) -> Flux2KleinPipeline:
    """Assemble a step-distilled klein pipeline from the parts."""
    return Flux2KleinPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )


def write(pipe: Flux2KleinPipeline, folder: Path) -> None:
    """Save the pipeline as shipped: bfloat16, safetensors, diffusers layout. The given models are cast to bfloat16."""
    pipe.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    OwnSettings(pipe.tokenizer.model_max_length, SIDE).write(folder)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Flux2KleinPipeline:
    """Load a checkpoint as a user would."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint (model_index.json is missing); train one first")
    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device())


def generate(
    pipe: Flux2KleinPipeline, prompts: list[str], seeds: list[int], steps: int = STEPS, batch: int = 25
) -> Iterator[NDArray[np.uint8]]:
    """Yield one image [SIDE, SIDE, 3] per prompt, each from its own seed, as the pipeline generates it alone."""
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[first : first + batch]]
        images = pipe(
            prompt=part,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=generators,
            max_sequence_length=pipe.tokenizer.model_max_length,
            output_type="np",
        ).images
        yield from (images * 255).round().astype(np.uint8)
