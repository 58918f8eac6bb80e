"""Layer groups, the unit of the search: layers with the same input, their cost, and the groups they smooth.

A finer unit gains nothing, since layers with the same input share its scale and become one product. A group whose
smoothing is folded into the rows of another group's layers loses it if those stay in high precision; the search
measures both errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kit.ports import PartName
from kit.recipes import KEEP, Number, Recipe, Rule, Scheme
from kit.variants import Variant
from quantize.apply.plan import QuantizationPlan
from quantize.linears import Linear
from quantize.sites import Site, sites

Cost = Literal["operations", "bytes"]  # of a spared group: low-precision operations or file size
Key = tuple[PartName, str]
BITS: Mapping[Number, int] = {"fp8": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Group:
    """Layers that are quantized or spared together."""

    part: PartName
    name: str  # name of the site: the first layer that reads the activation
    layers: tuple[str, ...]
    operations: float  # per image, in low precision if the group is quantized; 0 if only its weights are
    bytes: int  # growth of the file if the group is spared
    makers: tuple[str, ...] = ()  # groups whose rows hold the factors of this group's smoothing
    smoothed: bool = False

    @property
    def key(self) -> Key:
        return self.part, self.name

    def cost(self, cost: Cost) -> float:
        """Return the cost of sparing the group."""
        return self.operations if cost == "operations" else float(self.bytes)


@dataclass(frozen=True)
class ImageShape:
    """The size of one image, from which the operations of a group follow."""

    image_tokens: int
    steps: int
    passes: int  # 2 with classifier-free guidance


def find_groups(
    part: PartName, variant: Variant, plan: QuantizationPlan, image: ImageShape, spare: Scheme | None = None
) -> Iterator[Group]:
    """Yield the groups that a plan quantizes; `spare` is the scheme of spared groups, None for not quantized."""
    quantized = {linear.name: (linear, change) for change in plan.changes for linear in change.linears}
    named = {layer: site.readers[0] for site in sites(part, variant) for layer in site.readers}
    for site in sites(part, variant):
        layers = [name for name in site.readers if name in quantized]
        if not layers:
            continue
        found = [quantized[name] for name in layers]
        smoothing = plan.smoothings.get(site.name)
        yield Group(
            part,
            site.name,
            tuple(layers),
            sum(_operations(part, variant, lin, image) for lin, change in found if change.scheme.activations),
            sum(_growth(lin, change.scheme, spare) for lin, change in found),
            _makers(site, named),
            smoothing is not None and smoothing.alpha is not None,
        )


def tokens(part: PartName, layer: str, variant: Variant, image_tokens: int) -> int:
    """Return the number of rows that a layer multiplies per image and pass: image tokens, text tokens, or both."""
    if part == "text_encoder" or any(word in layer for word in (".add_", ".to_add_out", ".ff_context")):
        return variant.text_tokens
    if layer.startswith("single_transformer_blocks."):
        return image_tokens + variant.text_tokens
    return image_tokens


def rules(groups: Mapping[Key, Group], spared: frozenset[Key], scheme: str) -> tuple[Rule, ...]:
    """Return the rules that spare groups, to be put before the rules of the recipe."""
    return tuple(Rule(g.part, layer, scheme) for key, g in groups.items() if key in spared for layer in g.layers)


def everywhere(recipe: Recipe, scheme: str) -> Recipe:
    """Return the recipe with one scheme for all layers that it quantizes."""
    changed = tuple(rule if rule.scheme == KEEP else replace(rule, scheme=scheme) for rule in recipe.rules)
    return replace(recipe, rules=changed, smooth=False)


def _operations(part: PartName, variant: Variant, linear: Linear, image: ImageShape) -> float:
    calls = image.passes * (1 if part == "text_encoder" else image.steps)
    return 2.0 * linear.inputs * linear.outputs * tokens(part, linear.name, variant, image.image_tokens) * calls


def _growth(linear: Linear, scheme: Scheme, spare: Scheme | None) -> int:
    values = linear.inputs * linear.outputs
    before = linear.weight.nbytes if spare is None else values * BITS[spare.weights] // 8
    return before - values * BITS[scheme.weights] // 8  # without scales


def _makers(site: Site, named: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(named[rows.layer] for rows in site.rows if rows.layer in named))
