"""What is quantized and how, as data: schemes of one linear layer, and recipes that give each layer a scheme.

A recipe is a list of rules; the first rule that names a layer decides. Layers that no rule names stay as they are:
embedders, time and guidance MLPs, modulation, norm_out, proj_out, norms, RoPE and the whole VAE, because quantizing the
modulation alone turned images into noise (LPIPS 0.74 against 0.07, vllm-omni #2795).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from kit.dtypes import Compute, number_format
from kit.errors import UsageError
from kit.ports import QUANTIZED_PARTS, PartName

Number = Literal["fp8", "int8", "int4"]
Precision = Literal["fp32", "bf16", "fp8", "int8", "fp4"]  # what a tensor core multiplies in
Granularity = Literal["tensor", "channel", "block"]
KEEP = "keep"


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is stored and computed; without `activations` only its weights are quantized."""

    weights: Number
    granularity: Granularity
    activations: Literal["fp8", "int8"] | None = None
    block: int = 0  # weights along K that share a scale, where the granularity is "block"

    @property
    def bits(self) -> float:
        """Bits per weight with the fp32 scales of its blocks; scales per tensor or channel are too few to count."""
        scale = number_format("fp32").bits / self.block if self.block else 0
        return number_format(self.weights).bits + scale

    @property
    def narrow_scales(self) -> bool:
        """Whether weight scales are rounded to bf16, because a bf16 graph computes with them in bf16.

        TensorRT dequantizes blocks only to the type of their scales; scales per channel multiply the bf16 result.
        """
        return self.granularity == "block" or (self.granularity == "channel" and self.activations is not None)


SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme("fp8", "tensor", "fp8"),  # E4M3; per tensor: per-channel FP8 weights have fast kernels on Hopper only
    "fp8-channel": Scheme("fp8", "channel", "fp8"),
    "int8": Scheme("int8", "channel", "int8"),
    "int8-tensor": Scheme("int8", "tensor", "int8"),  # for comparison: one outlier channel costs all the others
    "int8-weights": Scheme("int8", "channel"),
    "int4-weights": Scheme("int4", "block", block=64),
}


@dataclass(frozen=True)
class Rule:
    """A scheme for the layers of one part whose names match a pattern."""

    part: PartName
    layers: str  # as in a shell: transformer_blocks.*.attn.to_q
    scheme: str  # a name in SCHEMES, or "keep"


@dataclass(frozen=True)
class Recipe:
    """A scheme for every linear layer."""

    name: str
    rules: tuple[Rule, ...] = ()
    compute: Compute = "bf16"  # of activations, attention and unquantized layers, as the planner assumes them on a GPU
    smooth: bool = False  # SmoothQuant: move outliers of activations into the weights, as far as pays per layer group
    percentile: float = 100.0  # of |activation| that the largest code stands for; 100 clips nothing that was seen
    attention: Literal["fp8"] | None = None  # what the transformer's attention multiplies in; None: the compute type

    def scheme(self, part: PartName, layer: str) -> str | None:
        """Return the name of a layer's scheme, or None where it stays as it is."""
        for rule in self.rules:
            if rule.part == part and fnmatchcase(layer, rule.layers):
                return None if rule.scheme == KEEP else rule.scheme
        return None

    @property
    def needs_calibration(self) -> bool:
        return any(rule.scheme != KEEP and SCHEMES[rule.scheme].activations for rule in self.rules)

    @property
    def block_scheme(self) -> Scheme | None:
        """Return the scheme of the transformer's blocks: that of the last rule, because exceptions come before it."""
        names = [rule.scheme for rule in self.rules if rule.part == "transformer"]
        return SCHEMES[names[-1]] if names and names[-1] != KEEP else None

    @property
    def math(self) -> Precision:
        """Return what the block linears multiply in."""
        scheme = self.block_scheme
        return scheme.activations if scheme and scheme.activations else self.compute

    @property
    def weight_bits(self) -> float:
        """Return the bits per weight of a block linear, scales included."""
        scheme = self.block_scheme
        return scheme.bits if scheme else number_format(self.compute).bits

    @property
    def compute_bytes(self) -> int:
        return number_format(self.compute).bits // 8


def _everywhere(scheme: str) -> tuple[Rule, ...]:
    return (
        Rule("transformer", "transformer_blocks.*", scheme),
        Rule("transformer", "single_transformer_blocks.*", scheme),
        Rule("text_encoder", "layers.*", scheme),
    )


# The input of a language model's down_proj has the largest outliers of all; the 8-bit recipes spare its activations.
_TEXT_DOWN = Rule("text_encoder", "layers.*.mlp.down_proj", "int8-weights")

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", compute="fp32"),
        Recipe("bf16"),
        Recipe("fp8", _everywhere("fp8")),
        Recipe("fp8-channel", _everywhere("fp8-channel")),
        Recipe("int8", (_TEXT_DOWN, *_everywhere("int8")), smooth=True),
        Recipe("int8-plain", (_TEXT_DOWN, *_everywhere("int8"))),
        Recipe("int8-weights", _everywhere("int8-weights")),
        Recipe("int4-weights", _everywhere("int4-weights")),
    )
}


def recipe(name: str) -> Recipe:
    """Look a recipe up by name; raises UsageError that lists them."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[name]


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name, or read it from a JSON file; raises UsageError for what is neither."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return read_recipe(path)
    raise UsageError(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}, or a JSON file")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file: `base`, a name in RECIPES, and what differs from it.

    `rules` go before those of the base, `percentile`, `smooth` and `attention` replace them, `name` names the result.
    Raises UsageError, naming file and key, for anything else.
    """
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"recipe {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: not valid JSON ({error})") from None
    known = {"name", "base", "rules", "percentile", "smooth", "attention"}
    if not isinstance(raw, dict) or set(raw) - known:
        extra = ", ".join(sorted(set(raw) - known)) if isinstance(raw, dict) else "no object"
        raise UsageError(f"recipe {path}: unknown key {extra}; there are: {', '.join(sorted(known))}")
    base = raw.get("base")
    if not isinstance(base, str) or base not in RECIPES:
        raise UsageError(f"recipe {path}: unknown base {base!r}; there are: {', '.join(RECIPES)}")
    rules = tuple(_rule(path, rule) for rule in _typed(path, {"rules": [], **raw}, "rules", list))
    found = replace(RECIPES[base], name=str(raw.get("name", path.stem)), rules=(*rules, *RECIPES[base].rules))
    if "smooth" in raw:
        found = replace(found, smooth=_typed(path, raw, "smooth", bool))
    if "attention" in raw:
        if raw["attention"] not in (None, "fp8"):
            raise UsageError(f'recipe {path}: attention {raw["attention"]!r} is neither "fp8" nor null')
        found = replace(found, attention=raw["attention"])
    if "percentile" in raw:
        found = replace(found, percentile=float(_typed(path, raw, "percentile", (int, float))))
    if not 90 <= found.percentile <= 100:
        raise UsageError(f"recipe {path}: percentile {found.percentile} is not between 90 and 100")
    return found


def write_recipe(path: Path, base: str, name: str, rules: tuple[Rule, ...]) -> None:
    """Write a recipe file that `read_recipe` reads."""
    plain = [{"part": rule.part, "layers": rule.layers, "scheme": rule.scheme} for rule in rules]
    path.write_text(json.dumps({"name": name, "base": base, "rules": plain}, indent=1) + "\n")


def _typed(path: Path, raw: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(raw[key], kind) or (kind is not bool and isinstance(raw[key], bool)):
        raise UsageError(f"recipe {path}: {key} {raw[key]!r} has the wrong type")
    return raw[key]


def _rule(path: Path, raw: Any) -> Rule:
    if not isinstance(raw, dict) or set(raw) != {"part", "layers", "scheme"}:
        raise UsageError(f"recipe {path}: a rule has part, layers and scheme, not {raw!r}")
    if raw["part"] not in QUANTIZED_PARTS:
        raise UsageError(
            f"recipe {path}: part {raw['part']!r} cannot be quantized; {' and '.join(QUANTIZED_PARTS)} can"
        )
    if raw["scheme"] not in (KEEP, *SCHEMES):
        raise UsageError(f"recipe {path}: unknown scheme {raw['scheme']!r}; there are: {KEEP}, {', '.join(SCHEMES)}")
    return Rule(raw["part"], str(raw["layers"]), raw["scheme"])
