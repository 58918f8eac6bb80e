"""Count the operations of each part from the variant's sizes; one multiply-add counts as two operations.

The formulas match torch.utils.flop_counter on the meta device to four digits (tests/export/test_flops.py). They count
matrix products, convolutions and attention; norms, activations and RoPE are counted as bytes (planner/work.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from kit.variants import TextEncoder, Transformer, Vae, Variant
from planner.convolutions import decoder_layers, encoder_layers

PIXELS_PER_LATENT = 8  # per side, in the VAE


@dataclass(frozen=True)
class Flops:
    """Operations of one pass, grouped by the format they can run in: quantized linears, attention and the rest."""

    linears: float
    attention: float
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.linears + self.attention + self.other


def transformer(sizes: Transformer, image_tokens: int, text_tokens: int, reference_tokens: int = 0) -> Flops:
    """Count one forward pass of one row; reference images lengthen the sequence, while the text length is fixed."""
    d, layers = sizes.dim, sizes.double_blocks + sizes.single_blocks
    image = image_tokens + reference_tokens
    sequence = image + text_tokens
    embedders = 2 if sizes.guidance_embeds else 1
    return Flops(
        linears=2 * sequence * (4 + 3 * sizes.mlp_ratio) * d**2 * layers,
        attention=4 * sequence**2 * d * layers,
        other=2 * image * sizes.channels * d * 2  # x_embedder and proj_out
        + 2 * text_tokens * sizes.joint_dim * d
        + 2 * (embedders * (sizes.time_channels * d + d**2) + 17 * d**2),  # time, guidance, modulation, norm_out
    )


def extract(sizes: Transformer, reference_tokens: int) -> Flops:
    """Count one pass of klein-kv over its references, which attend to themselves; the last block stops at its keys."""
    d, blocks = sizes.dim, sizes.double_blocks + sizes.single_blocks
    per_token = (4 + 3 * sizes.mlp_ratio) * d**2
    return Flops(
        linears=2 * reference_tokens * (per_token * blocks - (1 + sizes.mlp_ratio) * d**2),
        attention=4 * reference_tokens**2 * d * (blocks - 1),
        other=2 * reference_tokens * sizes.channels * d  # x_embedder
        + 2 * (sizes.time_channels * d + d**2 + 9 * d**2),  # time, modulation of images and of single blocks
    )


def cached(sizes: Transformer, image_tokens: int, text_tokens: int, reference_tokens: int) -> Flops:
    """Count one step of klein-kv, whose text and image tokens also attend to the keys and values of references."""
    plain = transformer(sizes, image_tokens, text_tokens)
    sequence, blocks = image_tokens + text_tokens, sizes.double_blocks + sizes.single_blocks
    attention = 4 * sequence * (sequence + reference_tokens) * sizes.dim * blocks
    return Flops(plain.linears, attention, plain.other)


def text_encoder(sizes: TextEncoder, text_tokens: int) -> Flops:
    """Count one pass up to the last tap; padding is included and the causal half of attention is not discounted."""
    layers = max(sizes.taps)
    return Flops(
        linears=2 * text_tokens * text_layer_weights(sizes) * layers,
        attention=4 * text_tokens**2 * sizes.heads * sizes.head_dim * layers,
    )


def vae_decoder(sizes: Vae, width: int, height: int) -> Flops:
    """Count the decoding of one image of `width` x `height` pixels."""
    return _vae(decoder_layers(sizes), sizes.decoder_channels[-1], width, height)


def vae_encoder(sizes: Vae, width: int, height: int) -> Flops:
    """Count the encoding of one image of `width` x `height` pixels."""
    return _vae(encoder_layers(sizes), sizes.channels[-1], width, height)


def image(variant: Variant, width: int, height: int, steps: int) -> float:
    """Count all operations of one image, including guidance's second pass."""
    tokens = variant.tokens(width, height)
    passes = 2 if variant.guidance == "cfg" else 1
    text = text_encoder(variant.text_encoder, variant.text_tokens).total
    step = transformer(variant.transformer, tokens, variant.text_tokens).total
    return passes * (text + steps * step) + vae_decoder(variant.vae, width, height).total


def text_layer_weights(sizes: TextEncoder) -> int:
    """Count the weights of one layer's linears: q, o, k, v and the three of the feed-forward."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return 2 * sizes.hidden * queries + 2 * sizes.hidden * keys + 3 * sizes.hidden * sizes.ffn


def _vae(layers: tuple[tuple[int, int, int, int], ...], mid: int, width: int, height: int) -> Flops:
    latent = (width // PIXELS_PER_LATENT) * (height // PIXELS_PER_LATENT)
    convolutions = sum(
        2 * kernel**2 * inward * outward * width * height / scale**2 for inward, outward, kernel, scale in layers
    )
    return Flops(linears=0.0, attention=4 * latent**2 * mid, other=convolutions + 2 * 4 * mid**2 * latent)
