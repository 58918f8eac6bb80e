"""Continue the training of a finished checkpoint: sharpen its decoder and repeat the transformer's last stages."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file

from kit.sample.world import Scene

from .decoder_training import sharpen_decoder
from .denoiser_training import LAST, hard_rows, train_denoiser, training_scenes
from .edit_training import train_edits
from .latents import Examples, examples, patches, prompt_features, prompts, token_weights
from .models import device
from .pipeline import load
from .recipe import Stages, TrainingRecipe
from .trainer import Report, Run, cached
from .training import claim, digests, replace_checkpoint


def keep_start(start: Path, work: Path) -> Path:
    """Copy the checkpoint into the work folder and return the copy, because ``start`` may also be the output folder.

    Raises ValueError if the folder continues another checkpoint.
    """
    kept, made = work / "start", work / "made.json"
    if not kept.exists():
        load(start)  # reports errors before anything is written
        shutil.copytree(start, work / "start.part", dirs_exist_ok=True)
        (work / "start.part").rename(kept)
    known = [digests(kept), json.loads(made.read_text()) if made.exists() else None]
    if digests(start) not in known:
        raise ValueError(f"{work} continues another checkpoint than {start}; remove it or choose another --work")
    return kept


def write_weights(pipe: Flux2KleinPipeline, start: Path, folder: Path) -> None:
    """Copy ``start`` with the trained weights inserted; a newly saved pipeline would record its source folder."""
    shutil.copytree(start, folder)
    for part in ("transformer", "vae"):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        state = getattr(pipe, part).to(torch.bfloat16).state_dict()
        shipped = load_file(path)
        assert state.keys() == shipped.keys()
        save_file(
            {name: state[name].to(tensor.dtype).cpu().contiguous() for name, tensor in shipped.items()},
            path,
            metadata={"format": "pt"},
        )


def settled_examples(pipe: Flux2KleinPipeline, scenes: list[Scene], work: Path) -> Examples:
    """Return the images of scenes without jitter, and their sentences, as training inputs."""
    latents = cached(work / "settled.safetensors", lambda: patches(pipe.vae, scenes).cpu()).to(device())
    features = cached(
        work / "features.safetensors", lambda: prompt_features(pipe.text_encoder, pipe.tokenizer, prompts(scenes)).cpu()
    )
    return replace(examples(pipe.vae, features.to(device()), latents), weights=token_weights(scenes).to(device()))


def go_on(
    recipe: TrainingRecipe,
    work: Path,
    start: Path,
    out: Path,
    report: Report | None = None,
    stages: Stages = "last",
) -> list[Run]:
    """Train ``start`` in the last stages, or to edit alone; write the result to ``out``.

    Text encoder and image encoder stay identical, because they define the transformer's inputs and outputs; with
    ``stages="edit"`` so does the decoder.
    """
    claim(work, recipe)
    kept = keep_start(start, work)
    pipe = load(kept)
    scenes = training_scenes(recipe.scenes, recipe.seed + 20)[: recipe.settled_scenes]
    settled = settled_examples(pipe, scenes, work)
    runs = list[Run]()
    if stages == "last":
        runs += sharpen_decoder(pipe.vae, recipe, work, report)
        hard = hard_rows(scenes)
        runs += train_denoiser(pipe.transformer, settled, settled, hard, recipe, work, report, names=LAST)
    runs += train_edits(pipe, scenes, settled, recipe, work, report)
    replace_checkpoint(lambda fresh: write_weights(pipe, kept, fresh), out)
    (work / "made.json").write_text(json.dumps(digests(out)))
    return runs
