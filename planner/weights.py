"""Count the weights of each part and the bytes that a recipe stores them in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kit.ports import PartName
from kit.recipes import Recipe
from kit.variants import TextEncoder, Transformer, Variant
from planner.convolutions import Layers, decoder_layers, encoder_layers
from planner.flops import text_layer_weights


@dataclass(frozen=True)
class WeightCount:
    """Number of weights of one part: those of linear layers that recipes quantize, and all others."""

    linears: int
    other: int

    @property
    def total(self) -> int:
        return self.linears + self.other

    def bytes(self, recipe: Recipe) -> int:
        """Return the size stored with a recipe; weights that are not quantized keep the compute type."""
        return round(self.linears * recipe.weight_bits / 8) + self.other * recipe.compute_bytes


def weights(part: PartName, variant: Variant) -> WeightCount:
    """Count the weights of an exported part; the text encoder ends at its last tap and has no head."""
    match part:
        case "transformer" | "transformer_cached":
            return _transformer(variant.transformer)
        case "transformer_extract":
            return _extract(variant.transformer)
        case "text_encoder":
            return _text_encoder(variant.text_encoder)
        case "vae_decoder":
            return _vae(decoder_layers(variant.vae), variant.vae.decoder_channels[-1])
        case "vae_encoder":
            return _vae(encoder_layers(variant.vae), variant.vae.channels[-1])


def checkpoint_bytes(variant: Variant) -> int:
    """Return the bytes of a published checkpoint in bf16: all layers of the text encoder, also those above the taps."""
    text = variant.text_encoder
    whole = replace(variant, text_encoder=replace(text, taps=(*text.taps[:2], text.layers)))
    parts: tuple[PartName, ...] = ("text_encoder", "transformer", "vae_encoder", "vae_decoder")
    return 2 * sum(weights(part, whole).total for part in parts)


def _transformer(sizes: Transformer) -> WeightCount:
    d = sizes.dim
    block = round((4 + 3 * sizes.mlp_ratio) * d**2)
    embedders = (2 if sizes.guidance_embeds else 1) * (sizes.time_channels * d + d**2)
    modulation = 17 * d**2  # two of 6 d, one of 3 d, and the 2 d of norm_out
    norms = sizes.head_dim * (4 * sizes.double_blocks + 2 * sizes.single_blocks)
    return WeightCount(
        linears=block * (2 * sizes.double_blocks + sizes.single_blocks),  # a double block has two sets
        other=embedders + modulation + norms + d * (2 * sizes.channels + sizes.joint_dim),
    )


def _extract(sizes: Transformer) -> WeightCount:
    """Count what klein-kv's references run through: no text stream, no head, and a last block without its output."""
    d = sizes.dim
    block = round((4 + 3 * sizes.mlp_ratio) * d**2)
    last_output = round((1 + sizes.mlp_ratio) * d**2)
    norms = sizes.head_dim * 2 * (sizes.double_blocks + sizes.single_blocks)
    return WeightCount(
        linears=block * (sizes.double_blocks + sizes.single_blocks) - last_output,
        other=sizes.time_channels * d + d**2 + 9 * d**2 + norms + d * sizes.channels,
    )


def _text_encoder(sizes: TextEncoder) -> WeightCount:
    layers = max(sizes.taps)
    norms = 2 * sizes.hidden + (2 * sizes.head_dim if sizes.kind == "qwen3" else 0)
    return WeightCount(linears=layers * text_layer_weights(sizes), other=sizes.vocab * sizes.hidden + layers * norms)


def _vae(layers: Layers, mid: int) -> WeightCount:
    convolutions = sum(kernel**2 * inward * outward + outward for inward, outward, kernel, _ in layers)
    return WeightCount(linears=0, other=convolutions + 4 * (mid**2 + mid))  # group norms are negligible
