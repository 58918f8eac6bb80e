"""Define the sizes of FLUX.1-dev for measurements of it, with the same operations per token in a different layout."""

from __future__ import annotations

from kit.variants import TextEncoder, Transformer, Vae, Variant

FLUX1_DEV = Variant(
    "flux1-dev",
    "dev",
    # GELU with ratio 4 takes 4 + 8 products of d x d per token where SwiGLU with ratio r takes 4 + 3 r
    Transformer(19, 38, 24, 128, joint_dim=4096, guidance_embeds=True, channels=64, mlp_ratio=8 / 3),
    TextEncoder("mistral3", 4096, 24, 64, 64, 64, 10240, 32128, 1e4, 1e-6, taps=(24, 24, 24), padding_side="right"),
    Vae(latent_channels=16),
    "embedded",
    28,
    3.5,
    "FLUX.1 [dev] Non-Commercial License",
)


def model(name: str) -> Variant:
    """Look up the model of a measurement: a published variant or flux1-dev."""
    return FLUX1_DEV if name == FLUX1_DEV.name else Variant.named(name)
