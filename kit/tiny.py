"""Build tiny random FLUX.2 pipelines from the real diffusers and transformers classes, for tests without downloads.

Only widths and depths are reduced. Everything that shapes a graph is real: 128 packed channels, 32 latents, the x8 VAE
with its 2x2 patches, four-axis RoPE, the text-encoder taps, padding sides, tied embeddings. The weights of the
transformer are scaled by `gain`, because at 1 the prompt changes the image by only 0.3 % and a parity test would not
notice the text.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.dtypes import Compute
from kit.own_settings import OwnSettings
from kit.variants import MAX_TEXT_TOKENS, Family

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

REVISION = 2  # increment when the same seed produces a different checkpoint
_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_QWEN_TEMPLATE = (
    "{%- for turn in messages %}{{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
_MISTRAL_SPECIALS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"),
)
_MISTRAL_TEMPLATE = (
    "{{- bos_token }}{%- for turn in messages %}"
    "{%- if turn.role == 'system' %}{{- '[SYSTEM_PROMPT]' }}{%- for part in turn.content %}{{- part.text }}"
    "{%- endfor %}{{- '[/SYSTEM_PROMPT]' }}"
    "{%- elif turn.role == 'user' %}{{- '[INST]' }}{%- for part in turn.content %}"
    "{%- if part.type == 'text' %}{{- part.text }}{%- else %}{{- '[IMG]' }}{%- endif %}{%- endfor %}{{- '[/INST]' }}"
    "{%- endif %}{%- endfor %}"
)


IMAGE_SIZE = 64
DEV_SHARPNESS = 3.0  # on queries and keys


@dataclass(frozen=True)
class Tiny:
    """Sizes and options of one tiny pipeline."""

    family: Family = "klein"
    double_blocks: int = 2
    single_blocks: int = 3
    heads: int = 2
    head_dim: int = 32
    text_hidden: int = 32
    # diffusers needs a smaller `max_sequence_length`; at one token per byte, dev's system prompt takes 170
    text_tokens: int = MAX_TEXT_TOKENS
    vae_channels: tuple[int, ...] = (8, 16, 32, 32)
    small_decoder: bool = False
    gain: float = 3.0
    seed: int = 0


def save(folder: Path, tiny: Tiny | None = None, dtype: Compute = "fp32", shard_bytes: int | None = None) -> Path:
    """Write a tiny checkpoint in diffusers layout and return its folder; the same arguments produce the same bytes.

    `shard_bytes` splits the weights of every part into shards of at most that many bytes, with an index, as in the
    large published checkpoints.
    """
    import torch

    pipe = pipeline(tiny)
    if dtype == "bf16":
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, torch.bfloat16)  # the class's own `to` warns about a partial cast
    shutil.rmtree(folder, ignore_errors=True)
    sharding = {"max_shard_size": shard_bytes} if shard_bytes else {}
    with _silent_progress():
        pipe.save_pretrained(folder, safe_serialization=True, **sharding)
    OwnSettings((tiny or Tiny()).text_tokens, IMAGE_SIZE).write(folder)
    return folder


@contextmanager
def _silent_progress() -> Iterator[None]:
    """Hide transformers' progress bars for a few kilobytes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pipeline(tiny: Tiny | None = None) -> DiffusionPipeline:
    """Build a tiny pipeline in fp32 and eval mode, without a progress bar; the global random state is preserved."""
    import diffusers
    import torch

    tiny = tiny or Tiny()
    with torch.random.fork_rng(devices=[]):
        encoder, tokenizer = _mistral3(tiny) if tiny.family == "dev" else _qwen3(tiny)
        tokenizer.model_max_length = tiny.text_tokens if tiny.text_tokens < MAX_TEXT_TOKENS else 131072
        parts = {
            "scheduler": _scheduler(),
            "vae": _vae(tiny),
            "text_encoder": encoder,
            "tokenizer": tokenizer,
            "transformer": _transformer(tiny),
        }
    match tiny.family:
        case "dev":
            pipe = diffusers.Flux2Pipeline(**parts)
        case "klein-kv":
            pipe = diffusers.Flux2KleinKVPipeline(**parts)
        case "klein" | "klein-base":
            pipe = diffusers.Flux2KleinPipeline(**parts, is_distilled=tiny.family == "klein")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler() -> Any:
    """Build the scheduler with the settings that all FLUX.2 checkpoints share."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _vae(tiny: Tiny) -> torch.nn.Module:
    import torch
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(tiny.seed + 2)
    *early, _, _ = tiny.vae_channels
    smaller = (*early, 24, 24) if tiny.small_decoder else None
    vae: Any = AutoencoderKLFlux2(
        block_out_channels=tiny.vae_channels,
        decoder_block_out_channels=smaller,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=32,
        sample_size=IMAGE_SIZE,
    )
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 2.0)
    ready: torch.nn.Module = vae.eval()
    return ready


def _transformer(tiny: Tiny) -> torch.nn.Module:
    import torch
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(tiny.seed)
    transformer: torch.nn.Module = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=tiny.double_blocks,
        num_single_layers=tiny.single_blocks,
        attention_head_dim=tiny.head_dim,
        num_attention_heads=tiny.heads,
        joint_attention_dim=3 * tiny.text_hidden,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(tiny.head_dim // 4,) * 4,
        rope_theta=2000,
        eps=1e-6,
        guidance_embeds=tiny.family == "dev",
    ).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(tiny.gain)
            else:
                parameter.uniform_(0.5, 1.5)  # norm weights: all ones would hide a swap
        if tiny.family == "dev":  # the system message dominates the prompt unless attention is sharp
            for name, parameter in transformer.named_parameters():
                if parameter.ndim == 1 and ".attn.norm_" in name:
                    parameter.mul_(DEV_SHARPNESS)
    return transformer


def _byte_vocabulary(specials: tuple[str, ...]) -> dict[str, int]:
    """Number the special tokens, then one token per byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate((*specials, *sorted(ByteLevel.alphabet())))}


def _qwen3(tiny: Tiny) -> tuple[torch.nn.Module, Any]:
    """Build a Qwen3 of real depth with tied embeddings, and its right-padding tokenizer."""
    import torch
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Qwen2TokenizerFast(
        vocab=_byte_vocabulary(_QWEN_SPECIALS),
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = _QWEN_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=tiny.text_hidden,
        intermediate_size=2 * tiny.text_hidden,
        num_hidden_layers=36,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(tiny.seed + 1)
    return Qwen3ForCausalLM(config).eval(), tokenizer


def _mistral3(tiny: Tiny) -> tuple[torch.nn.Module, Any]:
    """Build a Mistral3 of real depth with a one-layer vision tower, and its left-padding tokenizer.

    The published checkpoint wraps that tokenizer in a PixtralProcessor; for text the pipeline calls only
    `apply_chat_template`, which the tokenizer provides.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

    bytewise = Tokenizer(models.BPE(vocab=_byte_vocabulary(_MISTRAL_SPECIALS), merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=[token for token in _MISTRAL_SPECIALS if token.startswith("[")],
    )
    tokenizer.chat_template = _MISTRAL_TEMPLATE
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": tiny.text_hidden,
        "intermediate_size": 2 * tiny.text_hidden,
        "num_hidden_layers": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_theta": 1e9,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "head_dim": 16,
    }
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(tiny.seed + 1)
    return Mistral3ForConditionalGeneration(config).eval(), tokenizer
