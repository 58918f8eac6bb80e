"""The text encoders written for export: a Qwen3 or Mistral decoder truncated after its last tap.

The graph has no layers above it, no final norm, no language-model head and no vision tower. Attributes are named as in
the checkpoints. The two families differ only in the norm of queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.graphs.attention import HIDDEN, Attention, attend, stacked
from export.graphs.axes import join_axes, split_axis
from export.graphs.constants import hold_constant
from export.graphs.norms import as_type, rms_norm, unit_rms
from export.graphs.rotary import Rope, angles, rope_of_halves, rotate_halves, scaled, turns_per_id
from kit.variants import TextEncoder

Ropes = tuple[Rope, Rope]  # of queries, including the scale of attention, and of keys


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return as_type(unit_rms(x, self.eps), x.dtype) * self.weight  # the same order of operations as transformers


class SelfAttention(nn.Module):
    """Causal attention with fewer key heads than query heads; Qwen3 norms queries and keys, Mistral does not."""

    def __init__(self, sizes: TextEncoder, attention: Attention) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention = attention
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, queries, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, keys, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, sizes.hidden, bias=False)
        if sizes.kind == "qwen3":
            self.q_norm = Norm(sizes.head_dim, sizes.eps)
            self.k_norm = Norm(sizes.head_dim, sizes.eps)

    def forward(self, x: Tensor, ropes: Ropes, bias: Tensor, sighted: Tensor) -> Tensor:
        query_rope, key_rope = ropes
        query, key, value = (
            split_axis(project(x), -1, heads, self.sizes.head_dim)  # [B, T, heads, D]
            for project, heads in (
                (self.q_proj, self.sizes.heads),
                (self.k_proj, self.sizes.kv_heads),
                (self.v_proj, self.sizes.kv_heads),
            )
        )
        if self.sizes.kind == "qwen3":
            query = rms_norm(self.q_norm.weight, query, self.sizes.eps)  # stays fp32 until it is rotated
            key = rms_norm(self.k_norm.weight, key, self.sizes.eps)
        else:
            query, key = as_type(query, torch.float32), as_type(key, torch.float32)
        query = as_type(rotate_halves(query, query_rope), x.dtype).transpose(1, 2)
        key = as_type(rotate_halves(key, key_rope), x.dtype).transpose(1, 2)
        mixed = attend(self.attention, query, key, value.transpose(1, 2), bias).transpose(1, 2)  # [B, T, heads, D]
        out: Tensor = self.o_proj(join_axes(mixed * sighted, 2, 3))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: TextEncoder) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.ffn, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.ffn, bias=False)
        self.down_proj = nn.Linear(sizes.ffn, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """One layer of the language model."""

    def __init__(self, sizes: TextEncoder, attention: Attention) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden, sizes.eps)
        self.self_attn = SelfAttention(sizes, attention)
        self.post_attention_layernorm = Norm(sizes.hidden, sizes.eps)
        self.mlp = FeedForward(sizes)

    def forward(self, x: Tensor, ropes: Ropes, bias: Tensor, sighted: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), ropes, bias, sighted)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class LanguageModel(nn.Module):
    """The embedding and the layers up to the last tap."""

    def __init__(self, sizes: TextEncoder, attention: Attention) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(DecoderLayer(sizes, attention) for _ in range(max(sizes.taps)))


class TextEncoderGraph(nn.Module):
    """Map token ids and their mask to the concatenated hidden states of the taps."""

    rope_turns: Tensor

    def __init__(self, sizes: TextEncoder, attention: Attention) -> None:
        super().__init__()
        self.sizes = sizes
        self.attention = attention
        self.model = LanguageModel(sizes, attention)
        hold_constant(self, "rope_turns", turns_per_id(sizes.rope_theta, sizes.head_dim))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map ids and mask [B, T] to [B, T, 3H], one tap after another along the last axis."""
        tokens = input_ids.shape[1]
        # position 0 is the first of all T rows, whichever side is padded
        positions = torch.arange(tokens, device=input_ids.device)
        rope = rope_of_halves(angles(positions.reshape(1, tokens, 1), self.rope_turns))  # [1, T, 1, D]
        ropes = scaled(rope, self.sizes.head_dim**-0.5), rope
        causal = positions.unsqueeze(0) <= positions.unsqueeze(1)  # [T, T]: a row attends to itself and earlier rows
        seen = torch.logical_and(causal, attention_mask.to(torch.bool).unsqueeze(1).unsqueeze(1))  # [B, 1, T, T]
        x = self.model.embed_tokens(input_ids)  # [B, T, H]
        bias = torch.where(seen, 0.0, HIDDEN).to(x.dtype)
        bias = stacked(self.attention, bias, self.sizes.heads // self.sizes.kv_heads)
        # a padding row on the left attends to nothing; its attention output is defined as zero, as in torch
        sighted = seen.any(dim=-1, keepdim=True).transpose(1, 2).to(x.dtype)  # [B, T, 1, 1]
        taps = []
        for depth, layer in enumerate(self.model.layers, start=1):
            x = layer(x, ropes, bias, sighted)
            if depth in self.sizes.taps:
                taps.append(x)
        return torch.cat(taps, dim=-1)
