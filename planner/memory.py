"""Estimate the GPU memory of each part: weights by recipe, activations by shape, and a reserve for CUDA and the server.

Activations are counted as tensors of the compute type that are live at the peak of a fused graph. The count for the
transformer is anchored to two published figures: FLUX.1-dev takes 0.49 GB at 1024x1024 in fp16
(NVIDIA/Model-Optimizer#194, counted here: 0.48 GB), FLUX.2-dev about 1 GB in bf16 (TensorRT-Model-Connect's notes, read
2026-08-22, counted here: 0.96 GB). The arena is shared: text encoder, transformer and VAE never run at the same time,
so only the largest of them counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from kit.gpus import GB, Gpu
from kit.image_size import PIXELS_PER_TOKEN
from kit.ports import PartName
from kit.recipes import Recipe
from kit.variants import Variant
from planner.parts import reads_once
from planner.weights import weights

RESERVE = int(1.0 * GB)  # two CUDA contexts (server, denoiser) with their kernels, about 0.5 GB each
HOST_RESERVE = int(4.0 * GB)  # of host memory: operating system, server and its Python processes; not fitted
USABLE_SHARE = 0.97  # of the driver's figure; the rest is fragmentation and other processes
_BLOCK_WIDTHS = 17  # tensors of the model's width live in a single block: qkv, gate and up, attention, residual
_CONV_COPIES = 3  # full-size tensors live in the VAE's last stage: input, normalized, output
_SCORE_COPIES = 2  # the VAE's one attention head is too wide for fused kernels: scores and their softmax
REFERENCE_SIDE = 1024  # pixels; larger references are scaled down to one megapixel
_SCORE_CHUNKS = 4  # its queries attend in as many chunks, one after the other (export/graphs/vae.py)


@dataclass(frozen=True)
class Shape:
    """The inputs of one execution of the engines."""

    width: int
    height: int
    batch: int = 1  # images; guidance doubles the rows of the transformer
    references: int = 0  # images that each of them is made from
    reference_side: int = REFERENCE_SIDE  # pixels

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def reference_tokens(self) -> int:
        return self.references * (self.reference_side // PIXELS_PER_TOKEN) ** 2

    @property
    def encoded(self) -> Shape:
        """Return what the VAE encoder runs over: every reference of every image."""
        return Shape(self.reference_side, self.reference_side, self.batch * self.references)


def usable_bytes(gpu: Gpu) -> int:
    """Return the GPU memory that engines may use: the driver's figure without contexts and fragmentation."""
    return int(gpu.memory_bytes * USABLE_SHARE) - RESERVE


def rows(variant: Variant, batch: int) -> int:
    """Count the transformer's rows for a batch of images."""
    return batch * (2 if variant.guidance == "cfg" else 1)


def activation_bytes(part: PartName, variant: Variant, recipe: Recipe, shape: Shape) -> int:
    """Return the peak activation memory of a part for a shape."""
    size = recipe.compute_bytes
    match part:
        case "transformer":
            sequence = variant.tokens(shape.width, shape.height) + shape.reference_tokens + variant.text_tokens
            return transformer_activation_bytes(variant, recipe, sequence, rows(variant, shape.batch))
        case "transformer_extract":
            return transformer_activation_bytes(variant, recipe, shape.reference_tokens, rows(variant, shape.batch))
        case "transformer_cached":
            sequence = variant.tokens(shape.width, shape.height) + variant.text_tokens
            joined = cache_bytes(variant, recipe, shape) // _blocks(variant)  # with a block's own keys and values
            return transformer_activation_bytes(variant, recipe, sequence, rows(variant, shape.batch)) + joined
        case "text_encoder":
            text = variant.text_encoder
            width = 2 * text.ffn + 6 * text.hidden + 3 * text.hidden  # gate and up, one block, the three taps
            return rows(variant, shape.batch) * variant.text_tokens * width * size
        case "vae_decoder" | "vae_encoder":
            # At full size, the decoder has the channels of its second level, which it upsamples, the encoder its first.
            channels = variant.vae.decoder_channels[1] if part == "vae_decoder" else variant.vae.channels[0]
            convolutions = _CONV_COPIES * shape.pixels * channels * size
            latent = shape.pixels // 64
            return max(convolutions, _SCORE_COPIES * latent**2 * size // _SCORE_CHUNKS)  # images are decoded one by one


def transformer_activation_bytes(variant: Variant, recipe: Recipe, sequence: int, batch_rows: int) -> int:
    """Return the transformer's peak for rows of `sequence` tokens, including text; attention is fused."""
    return batch_rows * sequence * _BLOCK_WIDTHS * variant.transformer.dim * recipe.compute_bytes


def request_bytes(variant: Variant, recipe: Recipe, shape: Shape) -> int:
    """Return the memory of a batch's requests: latents and those of references, prompt embeddings and position ids."""
    tokens = variant.tokens(shape.width, shape.height) + shape.reference_tokens
    row = (tokens * variant.transformer.channels * 2 + variant.text_tokens * variant.transformer.joint_dim) * (
        recipe.compute_bytes
    ) + (tokens + variant.text_tokens) * 4 * 8
    return rows(variant, shape.batch) * row


def cache_bytes(variant: Variant, recipe: Recipe, shape: Shape) -> int:
    """Return the memory of the keys and values that klein-kv keeps of a batch's references: 2.15 GB per megapixel."""
    if not reads_once(variant, shape.references):
        return 0
    each = shape.reference_tokens * variant.transformer.dim * recipe.compute_bytes
    return rows(variant, shape.batch) * 2 * _blocks(variant) * each


def _blocks(variant: Variant) -> int:
    return variant.transformer.double_blocks + variant.transformer.single_blocks


def weight_bytes(part: PartName, variant: Variant, recipe: Recipe) -> int:
    """Return the size of a part's stored weights; the VAE is never quantized."""
    return weights(part, variant).bytes(recipe)


def gigabytes(count: float) -> str:
    """Format bytes as GB of 10^9 bytes with one decimal."""
    return f"{count / GB:.1f} GB"
