"""Decide before an engine build whether it can succeed; if not, give the reason and the nearest setting that would.

Only builds that certainly fail are rejected: a format that the GPU does not support, weights and activations that
exceed its memory, plans that exceed the disk, shapes outside the profile. `refusal` is pure and takes microseconds; the
builder's command calls it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kit.gpus import Gpu
from kit.image_size import MAX_TOKENS
from kit.ports import SERVED_PARTS, PartName
from kit.recipes import recipe
from kit.variants import Variant
from planner.memory import (
    Shape,
    activation_bytes,
    gigabytes,
    rows,
    transformer_activation_bytes,
    usable_bytes,
    weight_bytes,
)

MIN_TOKENS = 256  # 256x256
DISK_MARGIN = 1.05  # graphs, manifests, timing cache
SIDES = (2048, 1536, 1024, 768, 512, 256)  # the sizes suggested for a smaller profile


@dataclass(frozen=True)
class Build:
    """One engine build as requested on the command line."""

    variant: Variant
    recipe: str
    gpu: Gpu
    min_tokens: int = MIN_TOKENS  # image tokens of the smallest image that the profiles accept
    max_tokens: int = 4096  # of the largest; 4096 is 1024x1024
    batch: int = 1  # images
    reference_tokens: int = 0
    parts: tuple[PartName, ...] = SERVED_PARTS
    weight_streaming: bool = False  # weights stay in host memory and are streamed to the GPU
    stripped: bool = False  # STRIP_PLAN: the plan holds no weights
    disk_free: int | None = None  # free bytes on the disk of the plans; None if unknown


def refusal(build: Build) -> str | None:
    """Return why a build cannot succeed and the nearest setting that would; None if the build is feasible."""
    return build.gpu.refusal(build.recipe) or _profile_refusal(build) or _memory_refusal(build) or _disk_refusal(build)


def needed_bytes(build: Build) -> int:
    """Return a lower bound of the GPU memory needed to build and run the largest part at its largest shape."""
    return max(_part_bytes(build, part) for part in build.parts)


def _part_bytes(build: Build, part: PartName) -> int:
    chosen = recipe(build.recipe)
    stored = 0 if build.weight_streaming else weight_bytes(part, build.variant, chosen)
    if part == "transformer":
        sequence = build.max_tokens + build.reference_tokens + build.variant.text_tokens
        return stored + transformer_activation_bytes(build.variant, chosen, sequence, rows(build.variant, build.batch))
    if part == "text_encoder":
        return stored + activation_bytes(part, build.variant, chosen, Shape(256, 256, build.batch))
    return stored  # TensorRT chooses the tiling of the VAE, so its activations are unknown


def _profile_refusal(build: Build) -> str | None:
    low, high = build.min_tokens, build.max_tokens
    if low < 1 or low > high:
        return f"a profile of {low} to {high} image tokens is empty; use, for example, {MIN_TOKENS} to 4096"
    if high > MAX_TOKENS:
        return (
            f"a profile up to {high} image tokens exceeds the model family's limit of 4 megapixels; "
            f"nearest: {MAX_TOKENS} (2048x2048)"
        )
    if build.batch < 1:
        return f"batch {build.batch}: must be at least 1"
    return None


def _memory_refusal(build: Build) -> str | None:
    needed, usable = needed_bytes(build), usable_bytes(build.gpu)
    if needed <= usable:
        return None
    part = max(build.parts, key=lambda p: _part_bytes(build, p))
    why = (
        f"the {part.replace('_', ' ')} of {build.variant.name} in {build.recipe} needs {gigabytes(needed)} at "
        f"{build.max_tokens} image tokens, batch {build.batch}; {build.gpu.name} has {gigabytes(usable)} available"
    )
    changes = [
        next((words for words, changed in options if _fits(changed)), None)
        for options in (_smaller(build), _other_recipe(build), _streamed(build))
    ]
    found = [words for words in changes if words]
    return f"{why}: {' or '.join(found)}" if found else f"{why}, and no recipe or size makes it fit: use a larger --gpu"


def _fits(build: Build) -> bool:
    return build.gpu.refusal(build.recipe) is None and needed_bytes(build) <= usable_bytes(build.gpu)


def _smaller(build: Build) -> Iterator[tuple[str, Build]]:
    """Yield smaller batches, then smaller images."""
    for batch in range(build.batch - 1, 0, -1):
        yield f"use batch {batch}", replace(build, batch=batch)
    for side in SIDES:
        tokens = (side // build.variant.pixels_per_token) ** 2
        if build.min_tokens <= tokens < build.max_tokens:
            yield f"use at most {tokens} image tokens ({side}x{side})", replace(build, max_tokens=tokens)


def _other_recipe(build: Build) -> Iterator[tuple[str, Build]]:
    """Yield recipes that store less, at this batch and at batch 1."""
    bits = recipe(build.recipe).weight_bits
    names: tuple[str, ...] = ("bf16", build.gpu.default_recipe, "int8-weights", "int4-weights")
    for batch in sorted({build.batch, 1}, reverse=True):
        also = f" with batch {batch}" if batch != build.batch else ""
        for name in names:
            if recipe(name).weight_bits < bits:
                yield f"use --recipe {name}{also}", replace(build, recipe=name, batch=batch)


def _streamed(build: Build) -> Iterator[tuple[str, Build]]:
    """Yield weight streaming, at this batch and at batch 1."""
    if not build.weight_streaming:
        yield "stream the weights from host memory", replace(build, weight_streaming=True)
        yield "stream the weights from host memory with batch 1", replace(build, weight_streaming=True, batch=1)


def _disk_refusal(build: Build) -> str | None:
    if build.disk_free is None:
        return None
    stored = sum(weight_bytes(part, build.variant, recipe(build.recipe)) for part in build.parts)
    needed = int((stored if not build.stripped else 0.02 * stored) * DISK_MARGIN)
    if needed <= build.disk_free:
        return None
    why = f"the plans take about {gigabytes(needed)} and {gigabytes(build.disk_free)} of disk space are free"
    if not build.stripped and 0.02 * stored * DISK_MARGIN <= build.disk_free:
        return f"{why}: use stripped plans (they hold no weights) or another --out"
    return f"{why}: use another --out"
