"""The FLUX.2 diffusion transformer written for export: diffusers' modules and weights with a different forward.

It computes the same function as Flux2Transformer2DModel.forward with four differences: position ids may differ between
rows of a batch, RoPE stays in fp32 (no DOUBLE tensor), queries and keys go from their norm to RoPE without a round trip
through bf16, and values shared by all blocks (modulation, angles) are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from export.graphs.attention import Attention, attend
from export.graphs.axes import join_axes, split_axis
from export.graphs.constants import Float32, hold_constant
from export.graphs.fusion import project_image, project_text
from export.graphs.modulation import Mods, Modulation, modulations
from export.graphs.norms import as_type, rms_norm
from export.graphs.rotary import Rope, angles, rope_of_pairs, rotate_pairs, scaled, turns_per_id
from kit.errors import CheckpointError
from kit.variants import Transformer

Ropes = tuple[Rope, Rope]  # of queries, including the scale of attention, and of keys
Memory = tuple[Tensor, Tensor]  # rotated keys and values of reference tokens, each [B, H, R, D]
MAX_PERIOD = 10_000  # of the sinusoidal embeddings of timestep and guidance


class TransformerModule(nn.Module):
    """Base of all transformer graphs: diffusers' modules and the operations that their blocks share."""

    time_frequencies: Tensor
    rope_turns: Tensor

    def __init__(self, sizes: Transformer, attention: Attention) -> None:
        super().__init__()
        if len(set(sizes.rope_axes)) != 1 or sum(sizes.rope_axes) != sizes.head_dim:
            raise CheckpointError(
                f"transformer: axes_dims_rope {list(sizes.rope_axes)} is not four equal parts of the head dimension "
                f"{sizes.head_dim}; no published FLUX.2 differs there"
            )
        self.sizes = sizes
        self.attention = attention
        self.model = Flux2Transformer2DModel(
            in_channels=sizes.channels,
            num_layers=sizes.double_blocks,
            num_single_layers=sizes.single_blocks,
            attention_head_dim=sizes.head_dim,
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.joint_dim,
            timestep_guidance_channels=sizes.time_channels,
            mlp_ratio=sizes.mlp_ratio,
            axes_dims_rope=sizes.rope_axes,
            rope_theta=sizes.rope_theta,
            eps=sizes.eps,
            guidance_embeds=sizes.guidance_embeds,
        ).eval()
        hold_constant(self, "time_frequencies", time_frequencies(sizes.time_channels))
        hold_constant(self, "rope_turns", turns_per_id(sizes.rope_theta, sizes.rope_axes[0]))

    def use(self, double_block: Callable[..., Any], single_block: Callable[..., Any]) -> None:
        """Keep the modules and names of diffusers' blocks, but replace their forward with functions of (block, ...)."""
        for double in self.model.transformer_blocks:
            double.forward = partial(double_block, double)
        for single in self.model.single_transformer_blocks:
            single.forward = partial(single_block, single)

    def embed(self, value: Tensor, embedder: Any, compute: torch.dtype) -> Tensor:
        """Embed one number per row: scaled by 1000 in the compute type as in diffusers, fp32 sinusoids, cosines first.

        Every row is duplicated, because ONNX Runtime on a CPU sums the product of a single row with a matrix in a
        different order than the product of several rows if weights are not prepacked. A request alone must produce
        exactly the same bits as in a batch.
        """
        scaled = as_type(as_type(value, compute) * 1000, torch.float32)  # [B]
        angle = torch.cat([scaled, scaled]).unsqueeze(1) * self.time_frequencies  # [2B, 128]
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # [2B, 256]
        embedded: Tensor = embedder.linear_2(nn.functional.silu(embedder.linear_1(as_type(waves, compute))))
        return embedded

    def ropes(self, ids: Tensor) -> Ropes:
        """Return the rotations of queries, including the scale of attention, and of keys at position ids [B, S, 4]."""
        rope = rope_of_pairs(angles(ids, self.rope_turns))  # [B, S, 1, head_dim]
        return scaled(rope, self.sizes.head_dim**-0.5), rope

    def split(self, x: Tensor) -> Tensor:
        """Split [B, S, H * D] into heads [B, S, H, D]."""
        return split_axis(x, -1, self.sizes.heads, self.sizes.head_dim)

    def split_norm(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        """Split [B, S, H * D] into normalized heads [B, S, H, D], fp32.

        In a bf16 graph the squares are taken before the split: a compiler that sees one fp32 copy of the heads used
        twice writes it to memory (57 MB a block of klein-4b at one megapixel), but computes the two from bf16 on the
        fly.
        """
        if x.dtype == torch.float32:
            return rms_norm(norm.weight, self.split(x), self.sizes.eps)
        wide = as_type(x, torch.float32)
        mean_square = self.split(wide * wide).mean(dim=-1, keepdim=True)
        heads = as_type(self.split(x), torch.float32)
        return heads / torch.sqrt(mean_square + self.sizes.eps) * as_type(norm.weight, torch.float32)

    def rotate(self, x: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
        """Rotate fp32 heads [B, S, H, D] and return them in the layout of attention, [B, H, S, D]."""
        return as_type(rotate_pairs(x, rope), dtype).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from queries [B, H, S, D] to keys and values [B, H, K, D]; returns [B, S, H * D]."""
        return join_axes(attend(self.attention, query, key, value).transpose(1, 2), 2, 3)


class TransformerGraph(TransformerModule):
    """Map packed latents, text and position ids to a velocity."""

    def __init__(self, sizes: Transformer, attention: Attention) -> None:
        super().__init__(sizes, attention)
        self.use(self.double_block, self.single_block)

    def forward(
        self,
        hidden_states: Tensor,  # [B, S, 128]
        encoder_hidden_states: Tensor,  # [B, T, 3H]
        timestep: Tensor,  # [B], 0 to 1
        img_ids: Tensor,  # [B, S, 4]
        txt_ids: Tensor,  # [B, T, 4]
        guidance: Tensor | None = None,  # [B], the unscaled value
    ) -> Tensor:
        return self.velocity(hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, guidance)

    def velocity(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        memories: Iterable[Memory] = (),
    ) -> Tensor:
        """Compute a velocity [B, S, 128]; with `memories`, one per block, all tokens attend to those as well."""
        mods = self.modulate(timestep, hidden_states.dtype, guidance)
        text = self.model.context_embedder(encoder_hidden_states)  # [B, T, dim]
        return self.run_blocks(hidden_states, text, mods, self.ropes(torch.cat([txt_ids, img_ids], dim=1)), memories)

    def modulate(self, timestep: Tensor, compute: torch.dtype, guidance: Tensor | None = None) -> Mods:
        """Compute the 17 modulation vectors per row from timestep [B] and guidance [B]."""
        model = self.model
        rows = timestep.shape[0]
        time = self.embed(timestep, model.time_guidance_embed.timestep_embedder, compute)  # [2B, dim]
        if guidance is not None:
            time = time + self.embed(guidance, model.time_guidance_embed.guidance_embedder, compute)
        (single,) = modulations(model.single_stream_modulation(time)[:rows], 1)
        return Mods(
            image=modulations(model.double_stream_modulation_img(time)[:rows], 2),
            text=modulations(model.double_stream_modulation_txt(time)[:rows], 2),
            single=single,
            out=model.norm_out.linear(nn.functional.silu(time))[:rows],
        )

    def run_blocks(
        self, hidden_states: Tensor, text: Tensor, mods: Mods, ropes: Ropes, memories: Iterable[Memory] = ()
    ) -> Tensor:
        """Run the blocks on latents [B, S, 128] and embedded text [B, T, dim]: everything that changes at each step."""
        model = self.model
        image = model.x_embedder(hidden_states)  # [B, S, dim]
        memory = chain(memories, repeat(None))
        for double in model.transformer_blocks:
            image, text = double(image, text, mods.image, mods.text, ropes, next(memory))
        joint = torch.cat([text, image], dim=1)  # [B, T + S, dim]
        for single in model.single_transformer_blocks:
            joint = single(joint, mods.single, ropes, next(memory))
        image = joint[:, text.shape[1] :]

        scale, shift = mods.out.unsqueeze(1).chunk(2, dim=-1)
        velocity: Tensor = model.proj_out(model.norm_out.norm(image) * (1 + scale) + shift)
        return velocity

    def double_block(
        self,
        block: Flux2TransformerBlock,
        image: Tensor,
        text: Tensor,
        image_mods: list[Modulation],
        text_mods: list[Modulation],
        ropes: Ropes,
        memory: Memory | None,
    ) -> tuple[Tensor, Tensor]:
        """Run joint attention of both streams, each with its own weights, and then their feed-forwards."""
        attn = block.attn
        shift, scale, gate = image_mods[0]
        text_shift, text_scale, text_gate = text_mods[0]
        x = block.norm1(image) * scale + shift
        c = block.norm1_context(text) * text_scale + text_shift
        text_q, text_k, text_v = project_text(attn, c)
        image_q, image_k, image_v = project_image(attn, x)
        query = self.split_norm(text_q, attn.norm_added_q), self.split_norm(image_q, attn.norm_q)
        key = self.split_norm(text_k, attn.norm_added_k), self.split_norm(image_k, attn.norm_k)
        value = self.split(text_v), self.split(image_v)
        mixed = self.mix(torch.cat(query, dim=1), torch.cat(key, dim=1), torch.cat(value, dim=1), ropes, memory)
        tokens = text.shape[1]
        image = image + gate * attn.to_out[0](mixed[:, tokens:])
        text = text + text_gate * attn.to_add_out(mixed[:, :tokens])

        shift, scale, gate = image_mods[1]
        text_shift, text_scale, text_gate = text_mods[1]
        image = image + gate * block.ff(block.norm2(image) * scale + shift)
        text = text + text_gate * block.ff_context(block.norm2_context(text) * text_scale + text_shift)
        return image, text

    def single_block(
        self,
        block: Flux2SingleTransformerBlock,
        joint: Tensor,
        mod: Modulation,
        ropes: Ropes,
        memory: Memory | None,
    ) -> Tensor:
        """Run attention and feed-forward in parallel, with one input and one output projection."""
        attn = block.attn
        shift, scale, gate = mod
        dim, mlp = attn.inner_dim, attn.mlp_hidden_dim
        projected = attn.to_qkv_mlp_proj(block.norm(joint) * scale + shift)
        q, k, v, up, down = projected.split([dim, dim, dim, mlp, mlp], dim=-1)
        query, key = self.split_norm(q, attn.norm_q), self.split_norm(k, attn.norm_k)
        mixed = self.mix(query, key, self.split(v), ropes, memory)
        out: Tensor = attn.to_out(torch.cat([mixed, nn.functional.silu(up) * down], dim=-1))
        return joint + gate * out

    def mix(self, query: Tensor, key: Tensor, value: Tensor, ropes: Ropes, memory: Memory | None) -> Tensor:
        """Rotate fp32 queries and keys [B, S, H, D] and attend; returns [B, S, H * D] in the type of `value`."""
        query_rope, key_rope = ropes
        query, key = self.rotate(query, query_rope, value.dtype), self.rotate(key, key_rope, value.dtype)
        value = value.transpose(1, 2)  # [B, H, S, D]
        if memory is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), memory, strict=True))
        return self.attend(query, key, value)


def time_frequencies(channels: int) -> Float32:
    """Return the frequencies of the sinusoidal embedding, [channels / 2], identical to diffusers' to the last bit.

    An error of one unit in the last place would change an angle by 6e-5 at timestep 1000, so torch's own fp32
    exponential is used, outside the fake mode if one is active.
    """
    half = channels // 2
    with unset_fake_temporarily():
        exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        return torch.exp(exponent).numpy()
