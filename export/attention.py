"""Scaled dot-product attention in the two forms that an exported graph can have."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from export.axes import join_axes

Attention = Literal["matmul", "op"]  # MatMul-Softmax-MatMul, or the ONNX operator of opset 23
ATTENTION_OPSET = 23
HIDDEN = -1e9  # added to the score of a key that must not be seen; finite, so that a fully hidden row stays finite


def attend(form: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with queries [B, H, S, D], keys and values [B, H or a divisor of it, S, D]; returns [B, H, S, D].

    `bias` is added to the scores and broadcasts to [B, H, S, S]. `matmul` is fused by every TensorRT since 10; `op`
    needs 10.14. Both stay in 4-D, the only rank that TensorRT takes.
    """
    scale = query.shape[-1] ** -0.5
    if form == "op":
        operands = (query, key, value) if bias is None else (query, key, value, bias)
        shape = (*query.shape[:-1], value.shape[-1])
        return torch.onnx.ops.symbolic(
            "Attention", operands, {"scale": scale}, dtype=query.dtype, shape=shape, version=ATTENTION_OPSET
        )
    if key.shape[1] != query.shape[1]:
        key, value = (spread(x, query.shape[1] // x.shape[1]) for x in (key, value))
    scores = (query * scale) @ key.transpose(-1, -2)  # [B, H, S, S]; scaling q is cheaper than scaling the scores
    if bias is not None:
        scores = scores + bias
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed


def spread(x: Tensor, times: int) -> Tensor:
    """Repeat every head of x [B, H, S, D] for the `times` query heads that share it."""
    return join_axes(x.unsqueeze(2).expand(-1, -1, times, -1, -1), 1, 2)
