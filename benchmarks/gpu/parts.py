"""Measure one part in one mode at several shapes: seconds, operations per second, peak memory, error against fp32."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.baseline import baseline
from benchmarks.gpu.cases import Case, RunSettings, variant_of
from benchmarks.gpu.clock import clock
from benchmarks.gpu.modes import Call, Calls, mode_of, quantize_by_torchao, ready
from benchmarks.gpu.weights import inputs, random_part
from kit.ports import PartName
from kit.variants import Variant
from planner import flops

Measure = Callable[[Case], dict[str, Any]]


def open_part(settings: RunSettings, part: PartName, mode_name: str) -> Measure:
    """Set up a part in a mode; the module is built after all references, which take twice its memory."""
    variant = variant_of(settings)
    call: Call | None = None

    def measure(case: Case) -> dict[str, Any]:
        nonlocal call
        given = inputs(part, variant, case.side, case.batch, "bf16", settings.device)
        reference = None
        if call is None and case.batch == 1:
            reference = exact(part, variant, case, settings.device)
        call = call or build(settings, variant, part, mode_name)
        row = {"recipe": recipe_of(mode_name), "flops": operations(part, variant, case.side) * case.batch}
        if reference is not None:
            row |= {"error": relative_error(call(given), reference), "reference": "fp32, same weights"}
            del reference
        made = call
        return row | clock(lambda: made(given), settings.device, settings.seconds)

    return measure


def recipe_of(mode_name: str) -> str:
    """Return the recipe of the block linears in a mode."""
    from benchmarks.gpu.modes import MODES

    return MODES[mode_name].recipe if mode_name in MODES else "bf16"


def build(settings: RunSettings, variant: Variant, part: PartName, mode_name: str) -> Call:
    """Build a part with random weights in a mode."""
    if mode_name == "diffusers":
        return Calls(baseline(part, variant, settings.device))
    mode = mode_of(mode_name, settings)
    own = mode.recipe if mode.library == "own" else "bf16"
    module = random_part(part, variant, "bf16", settings.device, own)
    if mode.library == "torchao":
        quantize_by_torchao(module, mode.recipe)
    return ready(module, mode, settings)


@torch.no_grad()
def exact(part: PartName, variant: Variant, case: Case, device: str) -> Tensor:
    """Compute a part in fp32 from the same weights; the memory is released on return."""
    module = random_part(part, variant, "fp32", device)
    output: Tensor = module(**inputs(part, variant, case.side, case.batch, "fp32", device))
    result = output.clone()
    del module, output
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return result


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return the root mean square of the difference relative to that of the reference; bytes are centred first."""
    wide, exact_values = found.double(), reference.double()
    centre = exact_values.mean() if reference.dtype == torch.uint8 else 0.0
    scale = (exact_values - centre).square().mean().sqrt()
    return float((wide - exact_values).square().mean().sqrt() / scale.clamp(min=1e-12))


def operations(part: PartName, variant: Variant, side: int) -> float:
    """Count the operations of one row."""
    match part:
        case "transformer":
            return flops.transformer(variant.transformer, variant.tokens(side, side), variant.text_tokens).total
        case "text_encoder":
            return flops.text_encoder(variant.text_encoder, variant.text_tokens).total
        case _:
            return flops.vae_decoder(variant.vae, side, side).total
