"""Build the sample's models from the real classes of the family at the recipe's widths, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from .recipe import TrainingRecipe

TAPS = (9, 18, 27)  # hidden states of the text encoder that the transformer reads
LATENTS = 32  # channels of a latent pixel; four latent pixels make an image token of 128


def device() -> torch.device:
    """Return the GPU if one is available, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half() -> torch.autocast:
    """Compute matrix products in bfloat16 where the hardware has it: a GPU or a CPU with AVX512-BF16 or AMX.

    A CPU without it emulates it: measured three times slower than float32 on an Intel Xeon with AVX512 and VNNI.
    """
    fast = torch.cuda.is_available() or has_bfloat16(torch.cpu.get_capabilities())
    return torch.autocast(device().type, torch.bfloat16, enabled=fast)


def has_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Return whether a CPU computes bfloat16 products in hardware."""
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def build_text_encoder(recipe: TrainingRecipe, vocabulary: int, pad: int) -> Qwen3ForCausalLM:
    """Build a narrow Qwen3, deep enough for the taps, initialized so that activations keep their scale with depth."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=recipe.text_width,
        intermediate_size=recipe.text_hidden,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        num_key_value_heads=recipe.text_heads // 2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.normal_(0, 0.5)
            elif weight.ndim == 2:
                inner = ("o_proj.weight", "down_proj.weight")
                depth = (2 * recipe.text_layers) ** 0.5 if name.endswith(inner) else 1.0
                weight.normal_(0, 1 / (depth * weight.shape[1] ** 0.5))
    return model


def build_vae(recipe: TrainingRecipe) -> AutoencoderKLFlux2:
    """Build the image encoder and decoder."""
    torch.manual_seed(recipe.seed + 1)
    vae = AutoencoderKLFlux2(
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        norm_num_groups=recipe.vae_groups,
        latent_channels=LATENTS,
        sample_size=128,
    )
    with torch.no_grad():  # residual branches start at zero, so that colour passes through from the first step
        for name, weight in vae.named_parameters():
            if name.endswith(("conv2.weight", "to_out.0.weight")):
                weight.mul_(0.05)
    return vae


def build_transformer(recipe: TrainingRecipe) -> Flux2Transformer2DModel:
    """Build the transformer; its rotary axes split the head's width equally, as in the family."""
    torch.manual_seed(recipe.seed + 2)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENTS,
        num_layers=recipe.double_blocks,
        num_single_layers=recipe.single_blocks,
        attention_head_dim=recipe.head_width,
        num_attention_heads=recipe.heads,
        joint_attention_dim=len(TAPS) * recipe.text_width,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(recipe.head_width // 4,) * 4,
        rope_theta=2000,
        eps=1e-6,
        guidance_embeds=False,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the family's scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
