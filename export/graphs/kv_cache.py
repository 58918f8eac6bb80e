"""The two graphs of klein-kv, which processes reference images once and caches their keys and values.

diffusers runs its first step over text, references and image together ("extract") and later steps without the
references ("cached"). In that first step, references attend only to references and are modulated as at timestep 0, so
they depend on neither the prompt nor the noise. Here they have their own graph, and every step, including the first,
is a cached one. The results are the same. References are computed once for any number of images, the last block stops
at its keys and values, and no graph needs to know how many tokens are references.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from torch import Tensor, nn

from export.graphs.attention import Attention
from export.graphs.modulation import Modulation, modulations
from export.graphs.transformer import Memory, Ropes, TransformerGraph, TransformerModule
from kit.errors import CheckpointError
from kit.variants import Transformer

REFERENCE_TIMESTEP = 0.0


class ExtractGraph(TransformerModule):
    """Map packed latents of reference images to the keys and values of every block."""

    def __init__(self, sizes: Transformer, attention: Attention) -> None:
        if sizes.guidance_embeds:
            raise CheckpointError(
                "transformer: guidance_embeds is true; no published klein-kv has a guidance embedding"
            )
        super().__init__(sizes, attention)
        self.use(self.double_block, self.single_block)

    def forward(self, ref_hidden_states: Tensor, ref_ids: Tensor) -> tuple[Tensor, ...]:
        """Map references [B, R, 128] at ids [B, R, 4] to keys and values [B, H, R, D], block by block."""
        model = self.model
        at_rest = torch.full((1,), REFERENCE_TIMESTEP)
        time = self.embed(at_rest, model.time_guidance_embed.timestep_embedder, ref_hidden_states.dtype)
        double_mods = modulations(model.double_stream_modulation_img(time)[:1], 2)
        (single_mod,) = modulations(model.single_stream_modulation(time)[:1], 1)
        ropes = self.ropes(ref_ids)
        memories: list[Memory] = []
        x = model.x_embedder(ref_hidden_states)  # [B, R, dim]
        for double in model.transformer_blocks:
            x, memory = double(x, double_mods, ropes)
            memories.append(memory)
        *inner, last = model.single_transformer_blocks
        for single in inner:
            x, memory = single(x, single_mod, ropes, True)
            memories.append(memory)
        memories.append(last(x, single_mod, ropes, False)[1])
        return tuple(tensor for memory in memories for tensor in memory)

    def double_block(
        self, block: Flux2TransformerBlock, x: Tensor, mods: list[Modulation], ropes: Ropes
    ) -> tuple[Tensor, Memory]:
        """Run the image stream of a double block without the text stream."""
        attn = block.attn
        shift, scale, gate = mods[0]
        normed = block.norm1(x) * scale + shift
        query, key = self.split_norm(attn.to_q(normed), attn.norm_q), self.split_norm(attn.to_k(normed), attn.norm_k)
        memory = self.remember(key, self.split(attn.to_v(normed)), ropes)
        x = x + gate * attn.to_out[0](self.recall(query, memory, ropes))
        shift, scale, gate = mods[1]
        return x + gate * block.ff(block.norm2(x) * scale + shift), memory

    def single_block(
        self, block: Flux2SingleTransformerBlock, x: Tensor, mod: Modulation, ropes: Ropes, goes_on: bool
    ) -> tuple[Tensor, Memory]:
        """Run a single block; the last one stops at its keys and values."""
        attn = block.attn
        shift, scale, gate = mod
        dim, mlp = attn.inner_dim, attn.mlp_hidden_dim
        projected = attn.to_qkv_mlp_proj(block.norm(x) * scale + shift)
        q, k, v, up, down = projected.split([dim, dim, dim, mlp, mlp], dim=-1)
        memory = self.remember(self.split_norm(k, attn.norm_k), self.split(v), ropes)
        if not goes_on:
            return x, memory
        mixed = self.recall(self.split_norm(q, attn.norm_q), memory, ropes)
        out: Tensor = attn.to_out(torch.cat([mixed, nn.functional.silu(up) * down], dim=-1))
        return x + gate * out, memory

    def remember(self, key: Tensor, value: Tensor, ropes: Ropes) -> Memory:
        """Rotate fp32 keys [B, R, H, D] and cast them to the type of the values; returns both as [B, H, R, D]."""
        return self.rotate(key, ropes[1], value.dtype), value.transpose(1, 2)

    def recall(self, query: Tensor, memory: Memory, ropes: Ropes) -> Tensor:
        """Attend from fp32 queries [B, R, H, D] to the references themselves; returns [B, R, H * D]."""
        key, value = memory
        return self.attend(self.rotate(query, ropes[0], value.dtype), key, value)


class CachedGraph(TransformerGraph):
    """The transformer with text and image tokens that also attend to cached references."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        cache: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute a velocity; `cache` holds the outputs of ExtractGraph in order, each [B, H, R, D]."""
        assert cache is not None
        tensors = tuple(cache.values())
        memories = zip(tensors[::2], tensors[1::2], strict=True)
        return self.velocity(hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, guidance, memories)
