"""Define the FLUX.2 variants: sizes, text-encoder taps, padding, defaults and licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kit.errors import UsageError
from kit.image_size import PIXELS_PER_TOKEN

Guidance = Literal["none", "cfg", "embedded"]  # distilled away | two passes | a guidance embedding in the network
Family = Literal["klein", "klein-base", "klein-kv", "dev"]
MAX_TEXT_TOKENS = 512


@dataclass(frozen=True)
class Transformer:
    """Sizes of Flux2Transformer2DModel."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    joint_dim: int
    guidance_embeds: bool
    channels: int = 128  # packed latent channels: 32 latents x 2 x 2 patch
    mlp_ratio: float = 3.0
    rope_axes: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    time_channels: int = 256
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TextEncoder:
    """Sizes of the language model whose hidden states condition the transformer."""

    kind: Literal["qwen3", "mistral3"]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float
    eps: float
    taps: tuple[int, int, int]  # the hidden_states[k] that are concatenated; 0 is the embedding
    padding_side: Literal["left", "right"]


@dataclass(frozen=True)
class Vae:
    """Sizes of AutoencoderKLFlux2; `decoder_channels` differ from `channels` in the published small decoder."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_groups: int = 32
    bn_eps: float = 1e-4


@dataclass(frozen=True)
class Variant:
    """One member of the family: every size that shapes a graph, and its intended settings."""

    name: str
    family: Family
    transformer: Transformer
    text_encoder: TextEncoder
    vae: Vae
    guidance: Guidance
    steps: int
    guidance_scale: float
    licence: str
    text_tokens: int = MAX_TEXT_TOKENS
    image_size: int = 1024  # pixels per side if the request gives no size

    pixels_per_token = PIXELS_PER_TOKEN

    @property
    def max_references(self) -> int:
        """Return how many reference images an image may have, as the model cards say."""
        return 10 if self.family == "dev" else 4

    def tokens(self, width: int, height: int) -> int:
        """Return the number of image tokens of an image of `width` x `height` pixels."""
        return (width // self.pixels_per_token) * (height // self.pixels_per_token)

    @classmethod
    def named(cls, name: str) -> Variant:
        """Look up a published variant by name."""
        if name not in VARIANTS:
            raise UsageError(f"unknown variant {name!r}; there are: {', '.join(VARIANTS)}")
        return VARIANTS[name]


_QWEN3_4B = TextEncoder(
    "qwen3", 2560, 36, 32, 8, 128, 9728, 151936, rope_theta=1e6, eps=1e-6, taps=(9, 18, 27), padding_side="right"
)
_QWEN3_8B = replace(_QWEN3_4B, hidden=4096, ffn=12288)
_MISTRAL_24B = TextEncoder(
    "mistral3", 5120, 40, 32, 8, 128, 32768, 131072, rope_theta=1e9, eps=1e-5, taps=(10, 20, 30), padding_side="left"
)
_DIT_4B = Transformer(5, 20, 24, 128, joint_dim=7680, guidance_embeds=False)
_DIT_9B = Transformer(8, 24, 32, 128, joint_dim=12288, guidance_embeds=False)
_DIT_DEV = Transformer(8, 48, 48, 128, joint_dim=15360, guidance_embeds=True)
_FLUX_NC = "FLUX Non-Commercial License"

_KLEIN_4B = Variant("klein-4b", "klein", _DIT_4B, _QWEN3_4B, Vae(), "none", 4, 1.0, "Apache-2.0")
_KLEIN_9B = replace(_KLEIN_4B, name="klein-9b", transformer=_DIT_9B, text_encoder=_QWEN3_8B, licence=_FLUX_NC)

VARIANTS: Mapping[str, Variant] = {
    v.name: v
    for v in (
        _KLEIN_4B,
        _KLEIN_9B,
        replace(_KLEIN_9B, name="klein-9b-kv", family="klein-kv"),
        replace(_KLEIN_4B, name="klein-base-4b", family="klein-base", guidance="cfg", steps=50, guidance_scale=4.0),
        replace(_KLEIN_9B, name="klein-base-9b", family="klein-base", guidance="cfg", steps=50, guidance_scale=4.0),
        Variant("dev", "dev", _DIT_DEV, _MISTRAL_24B, Vae(), "embedded", 50, 4.0, _FLUX_NC),
    )
}
FAMILY_DEFAULTS: Mapping[Family, Variant] = {
    "klein": VARIANTS["klein-4b"],
    "klein-base": VARIANTS["klein-base-4b"],
    "klein-kv": VARIANTS["klein-9b-kv"],
    "dev": VARIANTS["dev"],
}
