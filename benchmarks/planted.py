"""Faults for `benchmarks gate`: what goes wrong in a quantizer, a build or a server, planted on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from kit.recipes import Recipe, Rule
from kit.safetensors_file import StoredTensor, read_header
from kit.sample.world import WORD_ROW
from quantize.gate.similarity import Pixels

TOKEN = 16  # pixels of an image token
WEIGHTS = Path("transformer") / "quantized.safetensors"
LAYER = "single_transformer_blocks.0.attn.to_out"
BLOCK = "single_transformer_blocks.1."
SWAPPED = ("transformer_blocks.0.ff.linear_in.weight.scale", "transformer_blocks.0.ff_context.linear_in.weight.scale")


def one_layer_at_4_bits(recipe: Recipe) -> Recipe:
    """Return a recipe that stores one layer of the transformer in 4 bits."""
    return Recipe(
        f"{recipe.name}-4bit",
        (Rule("transformer", LAYER, "int4-weights"), *recipe.rules),
        recipe.compute,
        recipe.smooth,
        recipe.percentile,
    )


def swap_two_scales(artifact: Path) -> None:
    """Swap the weight scales of two layers of equal shape."""
    tensors = read_header(artifact / WEIGHTS)
    first, second = (tensors[name] for name in SWAPPED)
    one, two = _read(first), _read(second)
    _write(artifact, {first.offset: two, second.offset: one})


def negate_a_block(artifact: Path) -> None:
    """Negate all quantized weights of one block, by their scales."""
    changed = {}
    for name, tensor in read_header(artifact / WEIGHTS).items():
        if name.startswith(BLOCK) and name.endswith(".scale"):
            changed[tensor.offset] = (-np.frombuffer(_read(tensor), "<f4")).astype("<f4").tobytes()
    _write(artifact, changed)


def blur_the_glyphs(pixels: Pixels) -> Pixels:
    """Blur the row of the image that holds a word, by a pixel."""
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1)))
    rows = np.arange(len(pixels))[:, None, None] // TOKEN == WORD_ROW
    return np.where(rows, blurred, pixels)


def shift_a_channel(pixels: Pixels) -> Pixels:
    """Scale the red channel by 98 %."""
    changed = pixels.copy()
    changed[..., 0] = np.round(pixels[..., 0] * 0.98)
    return changed


WEIGHT_FAULTS: Mapping[str, Callable[[Path], None]] = {
    "two scales swapped": swap_two_scales,
    "a block's weights negated": negate_a_block,
}
IMAGE_FAULTS: Mapping[str, Callable[[Pixels], Pixels]] = {
    "glyphs blurred": blur_the_glyphs,
    "red scaled by 98 %": shift_a_channel,
}


def _read(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        return stream.read(tensor.nbytes)


def _write(artifact: Path, changed: Mapping[int, bytes]) -> None:
    """Write bytes at offsets of the weights' file; its header, and so its digest, stays."""
    content = bytearray((artifact / WEIGHTS).read_bytes())
    for offset, data in changed.items():
        content[offset : offset + len(data)] = data
    (artifact / WEIGHTS).unlink()  # it may be a hard link
    (artifact / WEIGHTS).write_bytes(content)
