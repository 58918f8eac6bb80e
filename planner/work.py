"""Compute the work of one pass of a part: operations by kind, and bytes that must pass through memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kit.ports import PartName
from kit.recipes import Recipe
from kit.variants import Variant
from planner import flops
from planner.convolutions import Layers, decoder_layers, encoder_layers
from planner.memory import Shape, cache_bytes, rows
from planner.weights import weights


@dataclass(frozen=True)
class Work:
    """One pass over a batch."""

    linears: float  # operations of quantized linear layers
    attention: float
    other: float  # operations that stay in the compute type
    pass_bytes: float  # one tensor of the model's width, read or written once in every block
    conv_bytes: float  # inputs and outputs of every convolution, counted once
    weight_bytes: float
    cache_bytes: float = 0.0  # keys and values of references, read in every step

    @property
    def flops(self) -> float:
        return self.linears + self.attention + self.other


def work(part: PartName, variant: Variant, recipe: Recipe, shape: Shape) -> Work:
    """Return the work of one pass of a part for a batch of images."""
    size, stored = recipe.compute_bytes, float(weights(part, variant).bytes(recipe))
    match part:
        case "transformer" | "transformer_extract" | "transformer_cached":
            return _transformer(part, variant, recipe, shape, stored)
        case "text_encoder":
            text, count = variant.text_encoder, rows(variant, shape.batch)
            one = flops.text_encoder(text, variant.text_tokens)
            return _work(one, count, count * variant.text_tokens * text.hidden * max(text.taps) * size, 0.0, stored)
        case "vae_decoder":
            one = flops.vae_decoder(variant.vae, shape.width, shape.height)
            moved = _moved(decoder_layers(variant.vae), shape, size)
            return _work(one, shape.batch, 0.0, shape.batch * moved, stored)
        case "vae_encoder":
            one = flops.vae_encoder(variant.vae, shape.width, shape.height)
            moved = _moved(encoder_layers(variant.vae), shape, size)
            return _work(one, shape.batch, 0.0, shape.batch * moved, stored)


def _transformer(part: PartName, variant: Variant, recipe: Recipe, shape: Shape, stored: float) -> Work:
    sizes, count = variant.transformer, rows(variant, shape.batch)
    image, text, references = variant.tokens(shape.width, shape.height), variant.text_tokens, shape.reference_tokens
    cached = 0
    match part:
        case "transformer_extract":
            one, sequence = flops.extract(sizes, references), references
        case "transformer_cached":
            one, sequence = flops.cached(sizes, image, text, references), image + text
            cached = cache_bytes(variant, recipe, shape)
        case _:
            one, sequence = flops.transformer(sizes, image, text, references), image + references + text
    moved = count * sequence * sizes.dim * (sizes.double_blocks + sizes.single_blocks) * recipe.compute_bytes
    return replace(_work(one, count, moved, 0.0, stored), cache_bytes=float(cached))


def _work(one: flops.Flops, count: int, pass_bytes: float, conv_bytes: float, stored: float) -> Work:
    return Work(count * one.linears, count * one.attention, count * one.other, pass_bytes, conv_bytes, stored)


def _moved(layers: Layers, shape: Shape, size: int) -> float:
    return sum((inward + outward) * shape.pixels / scale**2 * size for inward, outward, _, scale in layers)
