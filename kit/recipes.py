"""What each recipe stores and multiplies in: the number formats of the block linears, and what a GPU needs for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from kit.errors import UsageError

RecipeName = Literal["fp32", "bf16", "fp8", "int8", "int8-weights", "int4-weights"]
Precision = Literal["fp32", "bf16", "fp8", "int8", "fp4"]  # what a tensor core multiplies in
RECIPE_NAMES: tuple[RecipeName, ...] = get_args(RecipeName)


@dataclass(frozen=True)
class Recipe:
    """How the linears of the transformer blocks are stored and multiplied; everything else keeps the compute type."""

    name: RecipeName
    compute: Literal["fp32", "bf16"]  # of activations, attention and all that is not quantized
    math: Precision  # of the quantized products
    weight_bits: float  # per weight of a quantized linear, scales included
    title: str

    @property
    def compute_bytes(self) -> int:
        return 4 if self.compute == "fp32" else 2


RECIPES: Mapping[RecipeName, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "fp32", "fp32", 32, "no quantization, fp32"),
        Recipe("bf16", "bf16", "bf16", 16, "no quantization, bf16"),
        Recipe("fp8", "bf16", "fp8", 8, "FP8 (E4M3) weights and activations"),
        Recipe("int8", "bf16", "int8", 8, "INT8 weights and activations (SmoothQuant)"),
        Recipe("int8-weights", "bf16", "bf16", 8, "INT8 weights, bf16 products"),
        Recipe("int4-weights", "bf16", "bf16", 4.5, "INT4 weights with one fp32 scale per 64, bf16 products"),
    )
}


def recipe(name: str) -> Recipe:
    """Look a recipe up by name; raises UsageError that lists them."""
    found = next((r for r in RECIPES.values() if r.name == name), None)
    if found is None:
        raise UsageError(f"unknown recipe {name!r}; there are: {', '.join(RECIPE_NAMES)}")
    return found
