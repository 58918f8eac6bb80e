"""Scaled dot-product attention: the two forms that an exported graph can have, and the one that torch runs fastest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# MatMul-Softmax-MatMul, or the ONNX operator of opset 23; sdpa is torch's own kernels, for modules that stay in torch
Attention = Literal["matmul", "op", "sdpa"]
ATTENTION_OPSET = 23
HIDDEN = -1e9  # added to the score of a key that must not be seen; finite, so that a fully hidden row stays finite


def attend(form: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with queries [B, H, S, D], keys and values [B, H or a divisor of it, S, D]; returns [B, H, S, D].

    The queries come scaled by D^-0.5: what rotates them can do that in passing. `bias` is added to the scores and
    broadcasts to [B, H, S, S]; for `matmul` with shared keys it is the one that `stacked` makes. `matmul` is fused by
    every TensorRT since 10; `op` needs 10.14. Both stay in 4-D, the only rank that TensorRT takes.
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
        if groups != heads:  # the fused kernels that take a bias want as many keys as queries
            key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    if groups != heads:  # the heads that share a key stand one below the other: no copies of keys and values
        query = query.reshape(batch, groups, heads // groups * tokens, width)
    scores = query @ key.transpose(-1, -2)  # [B, groups, heads / groups * S, S]
    if bias is not None:
        scores = scores + bias
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed if groups == heads else mixed.reshape(batch, heads, tokens, value.shape[-1])


def stacked(form: Attention, bias: Tensor, times: int) -> Tensor:
    """Repeat a bias [B, 1, S, S] for `times` query heads that share a key, in the form that needs it."""
    return torch.cat([bias] * times, dim=2) if form == "matmul" and times > 1 else bias
