"""Write checkpoints of the published sizes without weights: real names, shapes and shards in sparse files.

They allow measuring a full-size export (time, memory, bytes read and written) on a laptop: a sparse file of 64 GB takes
no disk space and reads as zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kit import own_settings, tiny
from kit.dtypes import ITEM_BYTES
from kit.safetensors_writer import Slot, reserve
from kit.variants import Variant

# The largest shard that save_pretrained writes: diffusers 10 GB; transformers 5 GB when these checkpoints were saved.
SHARD_BYTES: Mapping[str, int] = {"transformer": 10 * 10**9, "text_encoder": 5 * 10**9, "vae": 10 * 10**9}
STEMS: Mapping[str, str] = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}

Shapes = dict[str, tuple[int, ...]]


def write(variant: Variant, folder: Path) -> Path:
    """Write a checkpoint of a published variant in diffusers layout, with the tokenizer of the tiny checkpoints."""
    tiny.save(folder, tiny.Tiny(variant.family))
    (folder / own_settings.FILE).unlink()  # a published checkpoint has none
    for part, model in modules(variant).items():
        for old in (folder / part).glob("*.safetensors*"):
            old.unlink()
        (model.config.save_pretrained if part == "text_encoder" else model.save_config)(folder / part)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if getattr(model.config, "tie_word_embeddings", False):
            shapes.pop("lm_head.weight", None)  # a tied head is not stored twice
        write_shards(shapes, folder / part, STEMS[part], SHARD_BYTES[part])
    return folder


def modules(variant: Variant) -> dict[str, Any]:
    """Build the parts of a variant with the real classes on the meta device, without using memory."""
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    sizes = variant.transformer
    with torch.device("meta"):
        return {
            "transformer": Flux2Transformer2DModel(
                in_channels=sizes.channels,
                num_layers=sizes.double_blocks,
                num_single_layers=sizes.single_blocks,
                attention_head_dim=sizes.head_dim,
                num_attention_heads=sizes.heads,
                joint_attention_dim=sizes.joint_dim,
                guidance_embeds=sizes.guidance_embeds,
            ),
            "text_encoder": _text_encoder(variant),
            "vae": AutoencoderKLFlux2(
                block_out_channels=variant.vae.channels, decoder_block_out_channels=variant.vae.decoder_channels
            ),
        }


def _text_encoder(variant: Variant) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    sizes = variant.text_encoder
    text: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "rope_theta": sizes.rope_theta,
        "rms_norm_eps": sizes.eps,
    }
    if sizes.kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**text, tie_word_embeddings=sizes.hidden == 2560))
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config={"model_type": "mistral", "sliding_window": None, **text})
    )


def write_shards(shapes: Shapes, folder: Path, stem: str, shard_bytes: int) -> list[Path]:
    """Write sparse safetensors files, with a shard index if there is more than one."""
    shards = list(_split(shapes, shard_bytes))
    if len(shards) == 1:
        return [write_sparse(shards[0], folder / f"{stem}.safetensors")]
    paths = []
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        paths.append(write_sparse(shard, folder / name))
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(_nbytes(s) for s in shapes.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return paths


def _nbytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BYTES["BF16"]


def _split(shapes: Shapes, shard_bytes: int) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in shapes.items():
        if shard and sum(map(_nbytes, shard.values())) + _nbytes(shape) > shard_bytes:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write_sparse(shapes: Shapes, path: Path, dtype: str = "BF16") -> Path:
    """Write one safetensors file with a real header and a hole in place of the weights."""
    reserve(path, [Slot(name, dtype, shape) for name, shape in shapes.items()])
    return path
