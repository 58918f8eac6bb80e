"""Decide what happens to each linear layer of a part: its scheme, its scales, and how its input is smoothed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from kit.artifact import Manifest
from kit.errors import UsageError
from kit.gpus import Gpu
from kit.ports import PartName
from kit.recipes import RECIPES, SCHEMES, Recipe
from quantize.attention import QuantizedAttention, plan_attentions
from quantize.calibration.record import Record, Seen, check, fingerprint
from quantize.changes import Change
from quantize.conversions import Quantized
from quantize.fold import weight_factors
from quantize.linears import Linear, find_linears
from quantize.scales import LARGEST, SMALLEST_SCALE
from quantize.sites import sites
from quantize.smoothquant import Smoothing, activation_amax, choose_all

if TYPE_CHECKING:
    from torch import Tensor

NARROWEST = 16  # no runtime has a fast kernel for a narrower matrix (TensorRT; ModelOpt skips them too)


@dataclass(frozen=True)
class QuantizationPlan:
    """The changes to the linear layers and attentions of one part."""

    changes: list[Change]
    smoothings: Mapping[str, Smoothing]
    kept: Mapping[str, int]  # reason why layers are not quantized -> number of layers
    attentions: tuple[QuantizedAttention, ...] = ()


def check_recipe(manifest: Manifest, recipe: Recipe, record: Record | None, gpu: Gpu | None) -> None:
    """Raise UsageError, with the remedy, for a recipe that does not fit this artifact, record or GPU."""
    if not recipe.rules and recipe.name in ("fp32", "bf16") and recipe.name != manifest.compute:
        raise UsageError(
            f"recipe {recipe.name} changes no weight, and the artifact computes in {manifest.compute}: "
            f"export it with --dtype {recipe.name}"
        )
    if recipe.needs_calibration and record is None:
        raise UsageError(
            f"recipe {recipe.name} quantizes activations, which needs a calibration record: run "
            f"`python -m quantize calibrate CHECKPOINT --prompts kit --out cal.json` and add --calibration cal.json"
        )
    if gpu is not None:
        maths = {SCHEMES[rule.scheme].activations for rule in recipe.rules if rule.scheme in SCHEMES}
        for name in ("fp8", "int8"):
            refusal = gpu.refusal(name) if name in maths else None
            if refusal is not None:
                raise UsageError(refusal)


def plan(
    model: ir.Model, folder: Path, part: PartName, manifest: Manifest, recipe: Recipe, record: Record | None
) -> QuantizationPlan:
    """Decide what happens to each linear layer of a part; writes nothing and reads only samples of the weights."""
    linears = {linear.name: linear for linear in find_linears(model, folder)}
    _check_rules(recipe, part, linears)
    schemes: dict[str, str] = {}
    kept: Counter[str] = Counter()
    for name, linear in linears.items():
        scheme = recipe.scheme(part, name)
        reason = _reason_to_keep(linear, scheme)
        if reason is None and scheme is not None:
            schemes[name] = scheme
        else:
            kept[reason or "not in the recipe"] += 1
    seen = _seen_by(part, {name: linears[name] for name in schemes if SCHEMES[schemes[name]].activations}, record)
    smoothings: dict[str, Smoothing] = {}
    if recipe.smooth:
        smoothings = choose_all(list(sites(part, manifest.variant)), linears, schemes, seen)
    columns, rows = weight_factors(smoothings, linears)
    groups: dict[tuple[str, str], list[Linear]] = {}  # layers with the same input and the same scheme
    for name, scheme in schemes.items():
        groups.setdefault((linears[name].activation.name or "", scheme), []).append(linears[name])
    changes = []
    for (_, scheme), group in groups.items():
        form, scale = SCHEMES[scheme], None
        factors = columns.get(group[0].name)
        if form.activations:
            amax = activation_amax(seen[group[0].name], factors, recipe.percentile)
            scale = max(amax / LARGEST[form.activations], SMALLEST_SCALE)
        job = Quantized(
            tuple(linear.weight for linear in group),
            form,
            tuple(linear.scale for linear in group),
            factors,
            _joined_rows(group, rows),
            form.narrow_scales,
        )
        changes.append(Change(tuple(group), form, job, scale))
    attentions: tuple[QuantizedAttention, ...] = ()
    if recipe.attention is not None and part == "transformer":
        attentions = plan_attentions(model, folder, manifest.variant.transformer, record, rows)
    return QuantizationPlan(changes, smoothings, dict(kept), attentions)


def _check_rules(recipe: Recipe, part: PartName, linears: Mapping[str, Linear]) -> None:
    """Reject a rule of a recipe file that matches no layer: with a typo, a layer to spare would be quantized."""
    shipped = {rule for known in RECIPES.values() for rule in known.rules}
    for rule in recipe.rules:
        if rule.part == part and rule not in shipped and not any(fnmatchcase(name, rule.layers) for name in linears):
            raise UsageError(
                f"recipe {recipe.name}: {rule.layers!r} matches no linear layer of the {part} that can be quantized; "
                f"these can be, for example: {', '.join(list(linears)[:3])}"
            )


def _joined_rows(group: Sequence[Linear], rows: Mapping[str, Tensor]) -> Tensor | None:
    if not any(linear.name in rows for linear in group):
        return None
    import torch

    return torch.cat([rows.get(linear.name, torch.ones(linear.outputs)) for linear in group])


def _reason_to_keep(linear: Linear, scheme: str | None) -> str | None:
    if scheme is None:
        return "the recipe keeps it"
    if min(linear.inputs, linear.outputs) < NARROWEST:
        return f"narrower than {NARROWEST}"
    form = SCHEMES[scheme]
    if form.block and linear.inputs % form.block:
        return f"its input size is not a multiple of the block size {form.block}"
    if form.weights == "int4" and linear.outputs % 2:
        return "its output size is odd, and int4 codes are stored in pairs"
    return None


def _seen_by(part: PartName, linears: Mapping[str, Linear], record: Record | None) -> Mapping[str, Seen]:
    """Return the statistics of the layers; raises UsageError if the record is incomplete or of other weights."""
    if not linears or record is None:
        return {}
    layers = record.parts.get(part, {})
    for name, linear in linears.items():
        if name not in layers:
            raise UsageError(
                f"the calibration record has no entry for {name} in the {part}; calibrate again with --parts {part}"
            )
        if layers[name].channel_amax.shape != (linear.inputs,):
            raise UsageError(
                f"the calibration record is malformed: {name} in the {part} has {len(layers[name].channel_amax)} "
                f"channels, its weight has {linear.inputs}; calibrate again"
            )
        if layers[name].weight != fingerprint(linear.weight):
            raise UsageError(
                f"the calibration record belongs to another checkpoint: {name} in the {part} has different weights; "
                f"calibrate the checkpoint that was exported, with the same --lora"
            )
        check(name, layers[name], "the calibration record")
    return layers
