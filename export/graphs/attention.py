"""Compute scaled dot-product attention in the two forms that can be exported and the one that is fastest in torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# MatMul-Softmax-MatMul; the ONNX operator of opset 23; torch's own kernels, for modules that stay in torch
Attention = Literal["matmul", "op", "sdpa"]
ATTENTION_OPSET = 23
HIDDEN = -1e9  # added to the score of a masked key; finite, so that a fully masked row stays finite


def attend(form: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with queries [B, H, S, D], keys and values [B, H or a divisor of it, S, D]; returns [B, H, S, D].

    Queries must already be scaled by D^-0.5, which the rotary embedding does at no cost. `bias` is added to the scores
    and broadcasts to [B, H, S, S]; for `matmul` with shared keys it must come from `stacked`. TensorRT 10 and later
    fuse `matmul`; `op` needs 10.14. Both forms stay in 4-D, the only rank that TensorRT supports.
    """
    if form == "op":
        operands = (query, key, value) if bias is None else (query, key, value, bias)
        shape = (*query.shape[:-1], value.shape[-1])
        return torch.onnx.ops.symbolic(
            "Attention", operands, {"scale": 1.0}, dtype=query.dtype, shape=shape, version=ATTENTION_OPSET
        )
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    if form == "sdpa":
        if groups != heads:  # the fused kernels that support a bias need as many keys as queries
            key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    if groups != heads:  # stack the heads that share a key along the tokens instead of copying keys and values
        query = query.reshape(batch, groups, heads // groups * tokens, width)
    scores = query @ key.transpose(-1, -2)  # [B, groups, heads / groups * S, S]
    if bias is not None:
        scores = scores + bias
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed if groups == heads else mixed.reshape(batch, heads, tokens, value.shape[-1])


def stacked(form: Attention, bias: Tensor, times: int) -> Tensor:
    """Repeat a bias [B, 1, S, S] for `times` query heads that share a key if the form of attention needs it."""
    return torch.cat([bias] * times, dim=2) if form == "matmul" and times > 1 else bias
