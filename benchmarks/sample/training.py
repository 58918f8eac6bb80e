"""Train the sample checkpoint from scratch, stage by stage; every stage resumes from its checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .decoder_training import polish_decoder, sharpen_decoder
from .denoiser_training import hard_rows, train_denoiser, training_scenes
from .edit_training import train_edits
from .latents import examples, normalised, patches, prompt_features, prompts, set_statistics, token_weights
from .loras import STYLES, train_lora
from .models import build_text_encoder, build_transformer, build_vae, device
from .pipeline import assemble, write
from .recipe import TrainingRecipe
from .text_training import train_text
from .tokenizer import build_tokenizer
from .trainer import Report, Run, cached
from .vae_training import train_vae

LIMIT = 16_000_000  # maximum size of the shipped checkpoint and LoRAs in bytes
LORA_LIMIT = 500_000


def times(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Return the duration and the final state of each stage."""
    return {
        run.name: {
            "steps": run.stage.steps,
            "batch": run.stage.batch,
            "seconds": round(run.seconds, 1),
            "cpu_seconds": round(run.cpu_seconds, 1),
            "mean_loss_of_last_20": round(sum(run.losses[-20:]) / len(run.losses[-20:]), 5),
        }
        for run in runs
    }


def curves(runs: list[Run]) -> dict[str, list[float]]:
    """Return the losses of each model, with its stages concatenated."""
    joined: dict[str, list[float]] = {}
    for run in runs:
        model = run.name if run.name.startswith("lora") else run.name.split("_")[0]
        joined.setdefault(model, []).extend(run.losses)
    return joined


def claim(folder: Path, recipe: TrainingRecipe) -> None:
    """Bind a work folder to one recipe, so that it does not resume checkpoints of another recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    note, wanted = folder / "recipe.json", json.dumps(asdict(recipe), indent=1)
    if note.exists() and note.read_text() != wanted:
        raise ValueError(f"{folder} holds a training with another recipe ({note}); remove it or choose another --work")
    note.write_text(wanted)


def train_checkpoint(recipe: TrainingRecipe, work: Path, out: Path, report: Report | None = None) -> list[Run]:
    """Train text encoder, image codec and transformer, and write the finished pipeline to ``out``."""
    claim(work, recipe)
    tokenizer = build_tokenizer(recipe.text_tokens)
    encoder = build_text_encoder(recipe, len(tokenizer), tokenizer.pad_token_id).to(device())
    runs = train_text(encoder, tokenizer, recipe, work, report)
    vae = build_vae(recipe).to(device())
    runs += train_vae(vae, recipe, work, report)
    for part in (encoder, vae):  # the transformer is trained with these parts as they ship
        part.to(torch.bfloat16).to(torch.float32)
    scenes = training_scenes(recipe.scenes, recipe.seed + 20)
    latents = cached(work / "latents.safetensors", lambda: patches(vae, scenes, recipe.seed + 21).cpu()).to(device())
    set_statistics(vae, latents)
    features = cached(work / "features.safetensors", lambda: prompt_features(encoder, tokenizer, prompts(scenes)).cpu())
    trembling = examples(vae, features.to(device()), latents)
    still = scenes[: recipe.settled_scenes]
    latents = cached(work / "settled.safetensors", lambda: patches(vae, still).cpu()).to(device())
    settled = replace(trembling, tokens=normalised(vae, latents), weights=token_weights(still).to(device()))
    runs += polish_decoder(vae, recipe, work, report)
    runs += sharpen_decoder(vae, recipe, work, report)
    transformer = build_transformer(recipe).to(device())
    runs += train_denoiser(transformer, trembling, settled, hard_rows(still), recipe, work, report)
    pipe = assemble(vae, encoder, tokenizer, transformer)
    runs += train_edits(pipe, still, settled, recipe, work, report)
    replace_checkpoint(lambda fresh: write(pipe, fresh), out)
    return runs


def replace_checkpoint(write_to: Callable[[Path], None], out: Path) -> None:
    """Write a checkpoint next to ``out`` and then rename it, so that ``out`` is never partially written."""
    fresh = out.with_name(f"{out.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    write_to(fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def train_loras(
    recipe: TrainingRecipe, work: Path, checkpoint: Path, out: Path, report: Report | None = None
) -> list[Run]:
    """Train every LoRA on the shipped checkpoint."""
    return [train_lora(name, checkpoint, out, recipe, work, report) for name in STYLES]


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every shipped file that a model is loaded from, by its path in ``folder``."""
    shipped = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".jinja"))
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in shipped
        if path.name != "digests.json"
    }


def check_sizes(folder: Path) -> int:
    """Return the shipped bytes; raises ValueError if the checkpoint or a LoRA is too large."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total > LIMIT:
        raise ValueError(f"{folder} has {total} bytes, the limit is {LIMIT}; make the recipe narrower")
    for path in (folder / "loras").glob("*.safetensors"):
        if path.stat().st_size > LORA_LIMIT:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, the limit is {LORA_LIMIT}; lower lora_rank")
    return total
