"""Measure whole images from prompt to bytes: our modules in a mode, or diffusers' pipeline.

For our modules, the recipe of the mode applies to the transformer; text encoder and VAE stay in bf16. A batch of n has
n prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.baseline import autoencoder, baseline, language_model, need_diffusers
from benchmarks.gpu.cases import Case, RunSettings, variant_of
from benchmarks.gpu.clock import clock
from benchmarks.gpu.modes import MODES, Call
from benchmarks.gpu.parts import Measure, build, operations, recipe_of, relative_error
from kit.variants import Variant
from pipeline import schedule
from pipeline.noise import initial_latents
from pipeline.position_ids import image_ids, text_ids

PROMPT = "a red fox in fresh snow at dawn, the low sun behind it, photograph number"
Tokens = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # prompts to ids and masks, each [B, T]


def open_image(settings: RunSettings, _: str, mode_name: str) -> Measure:
    """Set up a whole pipeline in a mode."""
    variant = variant_of(settings)
    if mode_name == "diffusers":
        pipe = pipeline(variant, settings.device)

        def whole(case: Case) -> Any:
            return pipe(
                prompt=prompts(case.batch),
                width=case.side,
                height=case.side,
                num_inference_steps=settings.steps,
                guidance_scale=1.0,
                output_type="np",
            )
    else:
        ours = Ours(variant, settings, mode_name)
        whole = ours.generate

    def measure(case: Case) -> dict[str, Any]:
        row: dict[str, Any] = {"recipe": recipe_of(mode_name), "steps": settings.steps, "launch": settings.launch}
        if mode_name not in ("diffusers", "eager") and case.batch == 1:
            found = ours.latents(case)[0].clone()
            # the same weights and noise, eager; fp32 would not fit in memory together with bf16
            plain = Ours(variant, settings, "eager", only_transformer=ours)
            row |= {"error": relative_error(found, plain.latents(case)[0]), "reference": "eager bf16, last latents"}
            del plain
        timed = clock(lambda: whole(case), settings.device, settings.seconds)
        row["flops"] = case.batch * (
            settings.steps * operations("transformer", variant, case.side)
            + operations("text_encoder", variant, case.side)
            + operations("vae_decoder", variant, case.side)
        )
        return row | timed | {"images_per_minute": 60.0 * case.batch / timed["median"]}

    return measure


def prompts(count: int) -> list[str]:
    return [f"{PROMPT} {number}" for number in range(count)]


class Ours:
    """Our modules in a mode and the loop between them, on the device."""

    def __init__(
        self, variant: Variant, settings: RunSettings, mode_name: str, only_transformer: Ours | None = None
    ) -> None:
        self.variant, self.settings = variant, settings
        self.transformer: Call = build(settings, variant, "transformer", mode_name)
        if only_transformer is not None:
            self.tokens: Tokens = only_transformer.tokens
            self.text: Call = only_transformer.text
            self.decode: Call = only_transformer.decode
            return
        plain = mode_name if mode_name in MODES and MODES[mode_name].recipe == "bf16" else "graphs"
        if plain == "graphs" and settings.launch == "calls":
            plain = "compile"
        self.tokens = tokenizer(variant)
        self.text = build(settings, variant, "text_encoder", plain)
        self.decode = build(settings, variant, "vae_decoder", plain)

    def generate(self, case: Case) -> Tensor:
        """Generate images; returns bytes [B, H, W, 3] on the CPU."""
        packed, rows = self.latents(case)
        places = packed.transpose(1, 2).reshape(case.batch, -1, rows, rows)
        return self.decode({"latents": places}).cpu()

    @torch.no_grad()
    def latents(self, case: Case) -> tuple[Tensor, int]:
        """Denoise; returns packed latents [B, S, 128] and the rows of their grid."""
        device, per = self.settings.device, self.variant.pixels_per_token
        ids, mask = self.tokens(prompts(case.batch))
        embeds = self.text({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
        rows = case.side // per
        noise = initial_latents(self.variant, 1, case.batch, case.side, case.side, "bf16")
        latents = torch.from_numpy(noise).to(device, torch.bfloat16)
        levels = schedule.sigmas(rows * rows, self.settings.steps)
        times = schedule.timesteps(levels, "bf16")
        fixed = {
            "encoder_hidden_states": embeds,
            "img_ids": torch.from_numpy(image_ids(rows, rows)).expand(case.batch, -1, -1).to(device),
            "txt_ids": torch.from_numpy(text_ids(self.variant.text_tokens)).expand(case.batch, -1, -1).to(device),
        }
        for index, time in enumerate(times):
            timestep = torch.full((case.batch,), float(time), device=device)
            velocity = self.transformer({"hidden_states": latents, "timestep": timestep, **fixed})
            step = float(levels[index + 1] - levels[index])
            latents = (latents.float() + step * velocity.float()).to(torch.bfloat16)
        return latents, rows


def tokenizer(variant: Variant) -> Tokens:
    """Return a function from prompts to ids and masks: the kit's own encoder with a byte tokenizer."""
    from kit import tiny
    from pipeline.prompts import PromptEncoder

    with tempfile.TemporaryDirectory(prefix="flux2-tokenizer-") as folder:
        tiny.pipeline().tokenizer.save_pretrained(folder)
        encoder = PromptEncoder(Path(folder), variant.text_encoder.kind, variant.text_tokens)

    def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        made = [encoder.encode(text) for text in texts]
        ids, masks = ([getattr(m, name) for m in made] for name in ("input_ids", "attention_mask"))
        return torch.stack([torch.from_numpy(x) for x in ids]), torch.stack([torch.from_numpy(x) for x in masks])

    return tokens


def pipeline(variant: Variant, device: str) -> Any:
    """Build diffusers' klein pipeline with random weights at the variant's size and a byte tokenizer."""
    need_diffusers()
    from diffusers import Flux2KleinPipeline

    from kit import tiny

    small: Any = tiny.pipeline()
    transformer: Any = baseline("transformer", variant, device)
    pipe: Any = Flux2KleinPipeline(
        scheduler=small.scheduler,
        vae=autoencoder(variant, device),
        text_encoder=language_model(variant, device),
        tokenizer=small.tokenizer,
        transformer=transformer.model,
        is_distilled=True,
    )
    pipe.set_progress_bar_config(disable=True)
    if variant.text_tokens != 512 or variant.text_encoder.taps != (9, 18, 27):
        return ShortText(pipe, variant)
    return pipe


class ShortText:
    """A pipeline called with the text length and taps of a reduced variant."""

    def __init__(self, pipe: Any, variant: Variant) -> None:
        self.pipe, self.variant = pipe, variant

    def __call__(self, **options: Any) -> Any:
        taps = self.variant.text_encoder.taps
        return self.pipe(**options, max_sequence_length=self.variant.text_tokens, text_encoder_out_layers=taps)
