"""Prepare a search: plan the recipe for an artifact, and check that the checkpoint is the one it was exported from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from kit.artifact import Manifest
from kit.errors import UsageError
from kit.ports import QUANTIZED_PARTS, PartName
from kit.recipes import KEEP, SCHEMES, Recipe
from quantize.apply.plan import QuantizationPlan, check_recipe, plan
from quantize.calibration.fingerprints import fingerprints
from quantize.calibration.record import Record, fingerprint
from quantize.linears import find_linears
from quantize.search.groups import Cost, Group, ImageShape, Key, everywhere, find_groups
from quantize.search.sensitivity import Model, State
from quantize.search.simulate import Shelf


@dataclass(frozen=True)
class Subject:
    """The groups in the order of the graphs, and their layers in each state: quantized, unsmoothed and spared."""

    groups: Mapping[Key, Group]
    shelves: Mapping[State, Mapping[PartName, Shelf]]


def choose_cost(recipe: Recipe, spare: str, cost: Cost | None) -> Cost:
    """Return the unit of the cost; raises UsageError if nothing can be spared or sparing has no such cost."""
    schemes = {rule.scheme for rule in recipe.rules if rule.scheme != KEEP}
    if not schemes:
        raise UsageError(f"recipe {recipe.name} quantizes nothing, so there is nothing to search")
    if schemes == {spare}:
        raise UsageError(f"--spare {spare} is what recipe {recipe.name} does everywhere; there is nothing to search")
    saves = any(SCHEMES[scheme].activations for scheme in schemes)
    if cost == "operations" and not saves:
        raise UsageError(f"recipe {recipe.name} has no low-precision computation; search it with --cost bytes")
    return cost or ("operations" if saves else "bytes")


def open_subject(
    folder: Path, manifest: Manifest, model: Model, recipe: Recipe, record: Record | None, spare: str, image: ImageShape
) -> Subject:
    """Plan the recipe with all its alternatives; raises UsageError for a checkpoint the artifact was not made from."""
    check_recipe(manifest, recipe, record, None)
    scheme = None if spare == KEEP else SCHEMES[spare]
    groups: dict[Key, Group] = {}
    shelves: dict[State, dict[PartName, Shelf]] = {"quantized": {}, "unsmoothed": {}, "spared": {}}
    for part in QUANTIZED_PARTS:
        graph = ir.load(folder / manifest.part(part).graph)
        _check_same(part, graph, folder, model)

        def planned(wanted: Recipe, part: PartName = part, graph: ir.Model = graph) -> QuantizationPlan:
            return plan(graph, folder / part, part, manifest, wanted, record)

        base = planned(recipe)
        mine = {group.key: group for group in find_groups(part, manifest.variant, base, image, scheme)}
        groups |= mine
        shelves["quantized"][part] = Shelf(base.changes)
        losing = {layer for group in mine.values() if group.smoothed and group.makers for layer in group.layers}
        bare = planned(replace(recipe, smooth=False)).changes if losing and spare == KEEP else []
        shelves["unsmoothed"][part] = Shelf(c for c in bare if any(linear.name in losing for linear in c.linears))
        shelves["spared"][part] = Shelf(planned(everywhere(recipe, spare)).changes if scheme is not None else [])
    if not groups:
        raise UsageError(f"recipe {recipe.name} quantizes no layer of this artifact")
    return Subject(groups, shelves)


def _check_same(part: PartName, graph: ir.Model, folder: Path, model: Model) -> None:
    prints = fingerprints(model.bindings[part])
    for linear in find_linears(graph, folder / part):
        if prints.get(f"{linear.name}.weight") != fingerprint(linear.weight):
            raise UsageError(
                f"--checkpoint is not what {folder} was exported from: {linear.name} in the {part} has different "
                "weights; give that checkpoint, with the same --lora"
            )
