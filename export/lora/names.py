"""Find the weights that a module of an adapter file changes, however its name is written.

Trainers differ in what they put before a name (`base_model.model.`, `lora_unet_`), in writing dots as underscores, in
all of a name or in a part of it, and in splitting a fused matrix into numbered parts (`qkv.0`, `linear1.3`). A name is
therefore compared by its words, after the words of known wrappers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from export.names import ALIAS, Target, Targets, all_linears, bfl_norms
from kit.variants import TextEncoder, Transformer, Variant

LoraPart = Literal["transformer", "text_encoder"]
Sizes = Variant | Transformer  # with the sizes of a transformer alone, adapters of text encoders are refused
_WRAPPERS = re.compile(
    "base|model|diffusion|transformer|unet|lora|lycoris|lokr|loha|dit|flux|flux2|net|network|pipe|pipeline|module|"
    "denoiser|inner"
)
_TEXT_WRAPPERS = re.compile(
    "base|model|language|text|encoder|encoders|lora|lycoris|te|te1|transformer|qwen|qwen3|4b|8b|mistral|mistral3|24b|"
    "cond|stage|pipe|pipeline|module"
)
_TEXT = re.compile(
    r"(base_model\.model\.|pipe\.|pipeline\.)?(text_encoder|lora_te|lycoris_te|te\d?[._]|conditioner|cond_stage)"
)
_CLIP = "text_model"
_INSIDE = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "module"))
_TEXT_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class Spot:
    """The matrix or vector that a module's name stands for."""

    part: LoraPart
    known: str  # the name with dots, without wrappers
    targets: Targets
    piece: int | None = None  # of a fused matrix whose parts the file numbers


def part_of(name: str) -> LoraPart:
    """Return the part that a key or module name belongs to."""
    return "text_encoder" if _TEXT.match(name) else "transformer"


def find_spot(name: str, sizes: Sizes) -> Spot | None:
    """Return what a module's name stands for in a sizes, None if it has no such weight."""
    part = part_of(name)
    if part == "text_encoder" and _CLIP in name:
        return None
    wrappers = _WRAPPERS if part == "transformer" else _TEXT_WRAPPERS
    known = _flat(part, sizes)
    words = [word for step in name.split(".") if step not in _INSIDE for word in step.split("_") if word]
    for start in range(len(words)):
        rest = "_".join(words[start:])
        if rest in known:
            return Spot(part, known[rest], _names(part, sizes)[known[rest]])
        whole, _, number = rest.rpartition("_")
        if whole in known and number.isdecimal():
            return Spot(part, known[whole], _names(part, sizes)[known[whole]], int(number))
        if not wrappers.fullmatch(words[start]):
            return None
    return None


def nearest(name: str, sizes: Sizes) -> str | None:
    """Return the known name that is most like a module's name."""
    part = part_of(name)
    steps = [word for step in name.split(".") for word in step.split("_")]
    wrappers = _WRAPPERS if part == "transformer" else _TEXT_WRAPPERS
    known = {flat: name for flat, name in _flat(part, sizes).items() if not name.startswith(ALIAS[1])}
    while len(steps) > 1 and wrappers.fullmatch(steps[0]) and steps[1] != "blocks":
        steps = steps[1:]
    close = difflib.get_close_matches("_".join(steps), known, 1, cutoff=0.0)
    return known[close[0]] if close else None


def other_names(target: Target, sizes: Sizes) -> tuple[str, ...]:
    """Return every dotted name of the matrices that contain a target, diffusers' own first."""
    names = [name for name, targets in _names("transformer", sizes).items() if target in targets]
    whole = [
        name
        for name, targets in _names("transformer", sizes).items()
        if any(t.module == target.module for t in targets) and name not in names
    ]
    return tuple(dict.fromkeys((target.module, *names, *whole)))


def partitions(known: str, heights: Sequence[int], columns: int) -> list[tuple[int, ...]]:
    """Return the ways in which trainers split a matrix into numbered parts, as rows per part.

    `heights` are the rows of the module's targets. queries, keys and values are thirds; the first matrix of a single
    block is queries, keys, values and the feed-forward's two halves; that of a feed-forward is its two halves.
    """
    total = sum(heights)
    if len(heights) == 3:
        return [tuple(heights)]
    if known.endswith(("linear1", "to_qkv_mlp_proj")) and total > 3 * columns:
        rest = total - 3 * columns
        return [
            (columns, columns, columns, rest),
            (columns, columns, columns, rest // 2, rest - rest // 2),
            (3 * columns, rest),
        ]
    if known.endswith(("mlp.0", "linear_in")) and total % 2 == 0:
        return [(total // 2, total // 2)]
    return []


@cache
def _names(part: LoraPart, sizes: Sizes) -> Mapping[str, Targets]:
    """Map every dotted name in use to its targets."""
    if part == "transformer":
        return _of_transformer(sizes if isinstance(sizes, Transformer) else sizes.transformer)
    return {} if isinstance(sizes, Transformer) else _of_text(sizes.text_encoder)


def _of_transformer(sizes: Transformer) -> dict[str, Targets]:
    norms = bfl_norms(sizes)
    own: dict[str, Targets] = {norm: (Target(norm),) for norm in norms.values()}
    return all_linears(sizes) | {bfl: (Target(norm),) for bfl, norm in norms.items()} | own


def _of_text(sizes: TextEncoder) -> dict[str, Targets]:
    names = [f"layers.{i}.{linear}" for i in range(sizes.layers) for linear in _TEXT_LINEARS]
    return {name: (Target(name),) for name in names}


@cache
def _flat(part: LoraPart, sizes: Sizes) -> Mapping[str, str]:
    """Map every name, with underscores for dots, to the name."""
    return {name.replace(".", "_"): name for name in _names(part, sizes)}
