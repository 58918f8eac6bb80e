"""Place the parts of a variant on a GPU and count the bytes, to decide whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kit.gpus import Gpu
from kit.ports import PartName
from kit.recipes import RECIPES, Recipe
from kit.variants import Variant
from planner.built import Built
from planner.memory import (
    Shape,
    activation_bytes,
    cache_bytes,
    gigabytes,
    request_bytes,
    usable_bytes,
    weight_bytes,
)
from planner.parts import TRANSFORMERS, running_parts, step_part
from planner.weights import weights

Placement = Literal["resident", "evicted", "own-gpu", "cpu", "cache"]
PLACEMENTS: dict[Placement, str] = {
    "resident": "text encoder on the GPU",
    "evicted": "text encoder's weights streamed to the GPU for every prompt",
    "own-gpu": "text encoder on a separate GPU",
    "cpu": "text encoder on the CPU, in int8",
    "cache": "all prompt embeddings cached, no text encoder",
}
NOT_BUILT: Mapping[Placement, str] = {
    "cache": "the kit has no cache of prompt embeddings yet, so this plan is an estimate that cannot be deployed"
}
_LAYERS_IN_FLIGHT = 2  # of a part with streamed weights: one computes while the next is loaded


@dataclass(frozen=True)
class Choice:
    """One way to serve: the recipe, the place of the text encoder, whether the transformer's weights are streamed."""

    recipe: Recipe
    text_encoder: Placement
    streamed: bool = False

    def describe(self) -> str:
        streamed = ", transformer's weights streamed from host memory" if self.streamed else ""
        return f"{self.recipe.name}, {PLACEMENTS[self.text_encoder]}{streamed}"


@dataclass(frozen=True)
class Layout:
    """Bytes of a choice, and the reason if it does not work."""

    weights: dict[PartName, int]  # on the GPU
    arena: int  # activations; the parts share it, so the largest counts
    arena_part: PartName
    requests: int
    cache: int  # keys and values of references
    usable: int
    host: int  # weights that stay in host memory
    streamed: int  # bytes streamed to the GPU in every step
    streamed_once: int  # per batch of images, for their references
    reason: str | None

    @property
    def needed(self) -> int:
        return sum(self.weights.values()) + self.arena + self.requests + self.cache


def lay_out(
    variant: Variant, gpu: Gpu, choice: Choice, shape: Shape, gpus: int = 1, built: Built | None = None
) -> Layout:
    """Place the parts as chosen; `reason` says why the choice does not work, None if it does.

    The bytes of an engine that was built replace the formulas.
    """
    parts = running_parts(variant, shape.references)
    stored: dict[PartName, int] = {part: weight_bytes(part, variant, choice.recipe) for part in parts}
    if built is not None:
        stored = {part: built.stored(part, count) for part, count in stored.items()}
    on_gpu, host = dict(stored), 0
    if choice.text_encoder != "resident":
        on_gpu["text_encoder"] = _in_flight("text_encoder", variant, choice.recipe) if _evicted(choice) else 0
        host += _host_text_encoder(variant, choice, stored["text_encoder"])
    running = [p for p in parts if p != "text_encoder" or choice.text_encoder in ("resident", "evicted")]
    activations = {part: _activations(part, variant, choice.recipe, shape) for part in running}
    if built is not None:
        activations = {part: built.activations(part, count) for part, count in activations.items()}
    arena_part = max(running, key=lambda part: activations[part])
    found = Layout(
        weights=on_gpu,
        arena=activations[arena_part],
        arena_part=arena_part,
        requests=request_bytes(variant, choice.recipe, shape),
        cache=cache_bytes(variant, choice.recipe, shape),
        usable=usable_bytes(gpu),
        host=host,
        streamed=0,
        streamed_once=0,
        reason=None,
    )
    if choice.streamed:
        found = _stream(found, stored, variant, choice.recipe, step_part(variant, shape.references))
    reason = gpu.refusal(choice.recipe.name) or _missing(variant, choice, shape, found, gpus)
    return replace(found, reason=reason)


def _stream(found: Layout, stored: Mapping[PartName, int], variant: Variant, recipe: Recipe, step: PartName) -> Layout:
    """Leave in host memory what does not fit of the transformer, that of the steps last."""
    streaming = [part for part in TRANSFORMERS if part in stored]
    on_gpu = found.weights | {part: min(stored[part], _in_flight(part, variant, recipe)) for part in streaming}
    for part in sorted(streaming, key=lambda part: part != step):
        room = found.usable - replace(found, weights=on_gpu).needed + on_gpu[part]
        on_gpu[part] = min(stored[part], max(on_gpu[part], room))
    left = {part: stored[part] - on_gpu[part] for part in streaming}
    return replace(
        found,
        weights=on_gpu,
        host=found.host + sum(stored[part] for part, count in left.items() if count),
        streamed=left.pop(step),
        streamed_once=sum(left.values()),
    )


def _activations(part: PartName, variant: Variant, recipe: Recipe, shape: Shape) -> int:
    return activation_bytes(part, variant, recipe, shape.encoded if part == "vae_encoder" else shape)


def _missing(variant: Variant, choice: Choice, shape: Shape, layout: Layout, gpus: int) -> str | None:
    if layout.needed > layout.usable:
        largest = max(layout.weights, key=lambda part: layout.weights[part])
        parts = f"{gigabytes(layout.weights[largest])} weights of the {largest}"
        arena = f"{gigabytes(layout.arena)} activations of the {layout.arena_part}"
        cache = f", {gigabytes(layout.cache)} keys and values of references" if layout.cache else ""
        return f"needs {gigabytes(layout.needed)} ({gigabytes(layout.usable)} available): {parts}, {arena}{cache}"
    if choice.text_encoder == "own-gpu":
        if gpus < 2:
            return "needs a second GPU (--gpus 2)"
        alone = weight_bytes("text_encoder", variant, choice.recipe) + activation_bytes(
            "text_encoder", variant, choice.recipe, shape
        )
        if alone > layout.usable:
            return f"the text encoder needs {gigabytes(alone)} on its own GPU ({gigabytes(layout.usable)} available)"
    return None


def _evicted(choice: Choice) -> bool:
    return choice.text_encoder == "evicted"


def _host_text_encoder(variant: Variant, choice: Choice, stored: int) -> int:
    match choice.text_encoder:
        case "evicted":
            return stored
        case "cpu":
            return weight_bytes("text_encoder", variant, RECIPES["int8"])
        case _:
            return 0


def _in_flight(part: PartName, variant: Variant, recipe: Recipe) -> int:
    """Return the bytes of a part with streamed weights on the GPU: a few layers and all weights outside layers."""
    counted = weights(part, variant)
    streams = 1 if part == "transformer_extract" else 2  # in a double block
    if part == "text_encoder":
        layers = max(variant.text_encoder.taps)
    else:
        layers = streams * variant.transformer.double_blocks + variant.transformer.single_blocks
    layer = counted.linears / layers * recipe.weight_bits / 8
    return round(_LAYERS_IN_FLIGHT * layer) + counted.other * recipe.compute_bytes
