"""List the activations whose channels can be scaled at no cost: the layers that read them, and where the inverse goes.

SmoothQuant (Xiao et al., 2023) divides an activation's channels by s and multiplies the columns of the weights that
read it. Here the division needs no operator on the activation itself: it is folded into the modulation vectors
[B, 1, dim], the weight of a norm, or the rows of the linear layer that computes the channels; attention and SwiGLU's
product pass a factor per channel of their values through unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kit.ports import PartName
from kit.variants import TextEncoder, Transformer, Variant

Fold = Literal["modulation", "norm", "rows"]


@dataclass(frozen=True)
class Rows:
    """Rows of a linear layer that compute channels of a site: from `begin` in the layer, from `channel` in the site."""

    layer: str
    begin: int
    channel: int
    count: int


@dataclass(frozen=True)
class Site:
    """One activation, or two that must have the same factors, and the linear layers that read it."""

    readers: tuple[str, ...]
    fold: Fold
    rows: tuple[Rows, ...] = ()
    heads: tuple[int, int, int] | None = (
        None  # key heads, query heads per key head, width; query heads of one key head share factors
    )

    @property
    def name(self) -> str:
        return self.readers[0]


def sites(part: PartName, variant: Variant) -> Iterator[Site]:
    """Yield the sites of a part in the order of its blocks."""
    if part == "transformer":
        yield from _transformer(variant.transformer)
    if part == "text_encoder":
        yield from _text_encoder(variant.text_encoder)


def _transformer(sizes: Transformer) -> Iterator[Site]:
    dim, mlp = sizes.dim, int(sizes.dim * sizes.mlp_ratio)
    for i in range(sizes.double_blocks):
        at = f"transformer_blocks.{i}"
        yield Site((f"{at}.attn.to_q", f"{at}.attn.to_k", f"{at}.attn.to_v"), "modulation")
        yield Site((f"{at}.attn.add_q_proj", f"{at}.attn.add_k_proj", f"{at}.attn.add_v_proj"), "modulation")
        values = Rows(f"{at}.attn.to_v", 0, 0, dim), Rows(f"{at}.attn.add_v_proj", 0, 0, dim)
        yield Site((f"{at}.attn.to_out.0", f"{at}.attn.to_add_out"), "rows", values)
        for ff in (f"{at}.ff", f"{at}.ff_context"):
            yield Site((f"{ff}.linear_in",), "modulation")
            yield Site((f"{ff}.linear_out",), "rows", (Rows(f"{ff}.linear_in", mlp, 0, mlp),))
    for i in range(sizes.single_blocks):
        at = f"single_transformer_blocks.{i}.attn"
        yield Site((f"{at}.to_qkv_mlp_proj",), "modulation")
        made = Rows(f"{at}.to_qkv_mlp_proj", 2 * dim, 0, dim), Rows(f"{at}.to_qkv_mlp_proj", 3 * dim + mlp, dim, mlp)
        yield Site((f"{at}.to_out",), "rows", made)


def _text_encoder(sizes: TextEncoder) -> Iterator[Site]:
    width = sizes.kv_heads * sizes.head_dim
    for i in range(max(sizes.taps)):
        at = f"layers.{i}"
        yield Site(tuple(f"{at}.self_attn.{p}_proj" for p in "qkv"), "norm")
        yield Site(
            (f"{at}.self_attn.o_proj",),
            "rows",
            (Rows(f"{at}.self_attn.v_proj", 0, 0, width),),
            heads=(sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.head_dim),
        )
        yield Site((f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"), "norm")
        yield Site((f"{at}.mlp.down_proj",), "rows", (Rows(f"{at}.mlp.up_proj", 0, 0, sizes.ffn),))
