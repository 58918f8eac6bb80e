"""Measure FLUX.2-dev at its real shapes: its blocks, a projection of the whole step from them, and the whole step.

The projection times networks of (1, 1), (3, 1) and (1, 5) double and single blocks. Their differences give the time of
a block of each kind, the remainder is outside the blocks. The row is marked as a projection.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.cases import Case, RunSettings, shrink
from benchmarks.gpu.clock import Unavailable, clock
from benchmarks.gpu.modes import mode_of, ready
from benchmarks.gpu.parts import Measure, operations
from benchmarks.gpu.weights import inputs, random_part
from kit.recipes import recipe
from kit.variants import VARIANTS, Variant
from planner.weights import weights

BLOCKS = ((1, 1), (3, 1), (1, 5))
ROOM = 1.08  # relative to the weights' bytes: activations and workspaces of a step


def open_dev(settings: RunSettings, subject: str, recipe_name: str) -> Measure:
    """Measure blocks and project, or measure the whole transformer if it fits on the card."""
    full = VARIANTS["dev"] if settings.size == "true" else shrink(VARIANTS["dev"])

    def measure(case: Case) -> dict[str, Any]:
        row = {"recipe": recipe_name, "variant": "dev"}
        if subject == "whole":
            refuse_if_too_large(full, recipe_name, settings.device)
            return row | {"flops": operations("transformer", full, case.side)} | step(full, case, recipe_name, settings)
        timed = {}
        for double, single in BLOCKS:
            part = replace(full, transformer=replace(full.transformer, double_blocks=double, single_blocks=single))
            timed[double, single] = step(part, case, recipe_name, settings)
        return row | projection(full, {blocks: one["median"] for blocks, one in timed.items()}) | timed[1, 1]

    return measure


def projection(variant: Variant, medians: dict[tuple[int, int], float]) -> dict[str, Any]:
    """Project the step of the whole network from the medians of three small networks."""
    base = medians[1, 1]
    double = (medians[3, 1] - base) / 2
    single = (medians[1, 5] - base) / 4
    sizes = variant.transformer
    whole = base + (sizes.double_blocks - 1) * double + (sizes.single_blocks - 1) * single
    return {"double_block_seconds": double, "single_block_seconds": single, "projected_step_seconds": whole}


def step(variant: Variant, case: Case, recipe_name: str, settings: RunSettings) -> dict[str, Any]:
    """Time one transformer step."""
    mode = replace(mode_of("fp8", settings), recipe=recipe_name)
    module = random_part("transformer", variant, "bf16", settings.device, recipe_name)
    call = ready(module, mode, settings)
    given = inputs("transformer", variant, case.side, case.batch, "bf16", settings.device)
    return clock(lambda: call(given), settings.device, settings.seconds)


def refuse_if_too_large(variant: Variant, recipe_name: str, device: str) -> None:
    """Raise Unavailable if the card's free memory does not hold the weights and a step."""
    needed = weights("transformer", variant).bytes(recipe(recipe_name)) * ROOM
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info()
        if needed > free:
            raise Unavailable(f"the weights and a step take {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
