"""Compute the queries, keys and values of a double block with one matrix product instead of three.

The three weights read the same activations, so on a GPU one wide product saves two launches and two reads of its input.
The single blocks of FLUX.2 are trained in this form. An ONNX graph keeps the checkpoint's three tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = ("to_qkv", ("to_q", "to_k", "to_v"))
TEXT = ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))


def project_image(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of the image's tokens, each [B, S, dim]."""
    if hasattr(attn, IMAGE[0]):
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def project_text(attn: Any, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of the text's tokens, each [B, T, dim]."""
    if hasattr(attn, TEXT[0]):
        query, key, value = attn.to_added_qkv(c).chunk(3, dim=-1)
        return query, key, value
    return attn.add_q_proj(c), attn.add_k_proj(c), attn.add_v_proj(c)


def fuse_projections(blocks: Iterable[Any]) -> int:
    """Join the projections of double blocks and delete the separate ones; returns how many were joined.

    Must run before weights are quantized, because it joins plain weights. Only one set of old and new weights is in
    memory at a time.
    """
    joined = 0
    for block in blocks:
        for fused, single in (IMAGE, TEXT):
            weight = torch.cat([getattr(block.attn, name).weight for name in single])
            for name in single:
                delattr(block.attn, name)
            with torch.device("meta"):  # no memory for weights that are replaced immediately
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(block.attn, fused, linear)
            joined += 1
    return joined
