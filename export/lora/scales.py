"""Decide the scale of every module of an adapter file: alpha / rank from its tensor, a pattern, or the settings.

A pattern names modules as the model of the trainer does, which may be black-forest-labs' or diffusers' or one with
fused matrices. It is matched against the names in the file first; only a pattern that matches none of them is matched
against the other names of the same weights. One that matches nothing at all is an error: its value would be lost.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from export.lora.factors import read_alpha
from export.lora.keys import Module
from export.lora.names import Sizes, other_names
from export.lora.settings import LoraSettings
from kit.errors import UsageError

logger = logging.getLogger(__name__)
Value = TypeVar("Value", int, float)
Place = tuple[int, int]  # module, target
_WRAPPER = re.compile(r"(base_model\\?\.model\\?\.|model\\?\.|diffusion_model\\?\.|transformer\\?\.)+")


@dataclass(frozen=True)
class Strengths:
    """Alpha and rank of every target of every module, as far as the settings give them."""

    settings: LoraSettings | None
    alphas: Mapping[Place, float]
    ranks: Mapping[Place, int]

    @classmethod
    def of(cls, settings: LoraSettings | None, modules: Sequence[Module], sizes: Sizes) -> Strengths:
        """Match the patterns of the settings; raises UsageError for one that matches no module."""
        if settings is None:
            return cls(None, {}, {})
        return cls(
            settings,
            match(settings.origin, "alpha_pattern", settings.alpha_pattern, modules, sizes),
            match(settings.origin, "rank_pattern", settings.rank_pattern, modules, sizes),
        )

    def scale(self, where: str, module: Module, place: Place, rank: int | None) -> float:
        """Return the scale of one target; `rank` is that of the factors, None for factors without one.

        A LoKr of two whole matrices and a full difference have no rank, so an alpha beside them has no meaning.
        """
        stored = module.tensors.get("alpha")
        given = self.settings
        alpha = read_alpha(where, stored) if stored is not None else None
        if given is not None and not {"A", "B"} & set(module.tensors):
            raise UsageError(f"{given.origin}: these are settings of a LoRA, but {module.name!r} is not one")
        if rank is None:
            if alpha is not None and "diff" in module.tensors:
                logger.warning("%s: the alpha beside a full difference is not applied", where)
            return 1.0
        if given is None or given.alpha is None:
            return 1.0 if alpha is None else alpha / rank
        expected = self.ranks.get(place, given.rank)
        if expected is not None and expected != rank:
            raise UsageError(
                f"{given.origin}: gives rank {expected} for {module.name!r}, whose factors have rank {rank}; the "
                "settings belong to another file, or rank_pattern lacks this module"
            )
        chosen = self.alphas.get(place, given.alpha)
        if alpha is not None:
            if alpha != chosen:
                logger.warning(
                    "%s: alpha is %g in the file's tensor and %g in %s; the tensor's is applied",
                    where,
                    alpha,
                    chosen,
                    given.origin,
                )
            return alpha / rank
        return chosen / (math.sqrt(rank) if given.by_root else rank)


def match(
    origin: str, what: str, patterns: Mapping[str, Value], modules: Sequence[Module], sizes: Sizes
) -> dict[Place, Value]:
    """Return the value of the first pattern that matches, by module and target."""
    found: dict[Place, Value] = {}
    unused = dict(patterns)
    for i, module in enumerate(modules):
        names = (module.name, module.spot.known)
        key = next((key for key in patterns if _matches(key, names)), None)
        for j in range(len(module.spot.targets)) if key is not None else ():
            found[i, j] = patterns[str(key)]
        for used in [key for key in unused if _matches(key, names)]:
            del unused[used]
    matched = set()
    for i, module in enumerate(modules) if unused else ():
        for j, target in enumerate(module.spot.targets):
            others = other_names(target, sizes)
            keys = [key for key in unused if _matches(key, others)]
            matched.update(keys)
            if keys:
                found.setdefault((i, j), unused[keys[0]])
    if lost := next((key for key in unused if key not in matched), None):
        raise UsageError(
            f"{origin}: {what} {lost!r} matches no module of the adapter, under the names of the file or those of "
            "diffusers; correct the pattern or remove it"
        )
    return found


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Match the end of a name as peft does, with or without the wrappers before a pattern's name."""
    forms = {pattern, _WRAPPER.sub("", pattern, count=1) if _WRAPPER.match(pattern) else pattern}
    return any(re.fullmatch(rf"(.*\.)?({form})", name) for form in forms if form for name in names)
