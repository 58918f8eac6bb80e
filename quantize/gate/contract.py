"""Quality contracts: a file of bounds, and whether the measured intervals keep them.

    format = 1
    about = "why these bounds"
    least_prompts = 32

    [bounds.ssim]
    at_least = 0.9

    [bounds.lpips]
    at_most = 0.1
    when = "measured"

A bound must hold for the whole 95 % interval, not for the mean. A metric that a contract names and that was not
measured breaks it, unless its bound counts only when measured.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from kit.errors import UsageError
from quantize.gate.intervals import Interval
from quantize.gate.metrics import METRICS

FORMAT = 1
When = Literal["always", "measured"]
KEYS = ("format", "about", "least_prompts", "bounds")
BOUND_KEYS = ("at_least", "at_most", "when")


@dataclass(frozen=True)
class Bound:
    """What one metric must reach: at least `value` where higher is better, at most where lower is."""

    metric: str
    value: float
    when: When = "always"

    @property
    def side(self) -> Literal["at_least", "at_most"]:
        return "at_least" if METRICS[self.metric].better == "higher" else "at_most"

    def __str__(self) -> str:
        return f"{self.metric} {self.side.replace('_', ' ')} {self.value:g}"

    def fault(self, found: Interval) -> str | None:
        """Say how the bound is broken; None when it holds."""
        sign = 1 if self.side == "at_least" else -1
        worse = found.low if self.side == "at_least" else found.high
        if sign * (worse - self.value) >= 0:
            return None
        told = f"{self}: found {found.mean:.4g}, between {found.low:.4g} and {found.high:.4g} with 95 % confidence"
        if sign * (found.mean - self.value) >= 0:
            told += f"; the mean keeps it, but {found.prompts} prompts do not prove it"
        return told


@dataclass(frozen=True)
class Contract:
    """Bounds, and the fewest prompts over which they may be judged."""

    name: str
    about: str
    least_prompts: int
    bounds: tuple[Bound, ...]

    def gaps(self, measurable: Collection[str], reasons: Mapping[str, str], prompts: int) -> list[str]:
        """Say what keeps the contract from being judged, whatever the images look like."""
        gaps = []
        if prompts < self.least_prompts:
            gaps.append(f"{prompts} prompts are drawn, the contract asks for at least {self.least_prompts}")
        for bound in self.bounds:
            if bound.when == "always" and bound.metric not in measurable:
                gaps.append(f"{bound}: not measured, because {reasons.get(bound.metric, 'no prompt asks for it')}")
        return gaps

    def faults(self, found: Mapping[str, Interval], reasons: Mapping[str, str], prompts: int) -> list[str]:
        """Say one sentence per gap and per broken bound."""
        broken = (bound.fault(found[bound.metric]) for bound in self.bounds if bound.metric in found)
        return self.gaps(found, reasons, prompts) + [fault for fault in broken if fault]


def shipped() -> list[str]:
    """Name the recipes for which the kit has a contract."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def of_recipe(recipe: str) -> Contract:
    """Load the kit's contract for a recipe; raises UsageError when there is none."""
    if recipe not in shipped():
        raise UsageError(
            f"no contract ships for the recipe {recipe!r}; there are: {_names()}; name one or a file by --contract"
        )
    return parse((_folder() / f"{recipe}.toml").read_text(encoding="utf-8"), "toml", recipe)


def find(word: str) -> Contract:
    """Load what --contract names: a file, or a recipe whose contract ships."""
    if word in shipped():
        return of_recipe(word)
    if not Path(word).is_file():
        raise UsageError(f"--contract {word}: no such file, and no contract of that name; there are: {_names()}")
    return load(Path(word))


def load(path: Path) -> Contract:
    """Load a contract from TOML or, by its suffix, JSON; raises UsageError that names the key at fault."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not valid UTF-8") from None
    return replace(parse(content, "json" if path.suffix == ".json" else "toml", str(path)), name=path.name)


def parse(content: str, form: Literal["toml", "json"], name: str) -> Contract:
    """Read a contract's text; unknown keys and metrics are errors."""
    try:
        raw = tomllib.loads(content) if form == "toml" else json.loads(content)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{name}: not valid {form.upper()} ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UsageError(f"{name}: format is not {FORMAT}; this kit reads contracts of that format only")
    _only(raw, KEYS, name)
    bounds, least, about = raw.get("bounds"), raw.get("least_prompts", 1), raw.get("about", "")
    if not isinstance(bounds, dict) or not bounds:
        raise UsageError(f"{name}: bounds is missing or empty; a contract without a bound promises nothing")
    if not isinstance(least, int) or isinstance(least, bool) or least < 1:
        raise UsageError(f"{name}: least_prompts {least!r} is not a positive whole number")
    if not isinstance(about, str):
        raise UsageError(f"{name}: about {about!r} is not text")
    return Contract(name, about, least, tuple(_bound(key, entry, name) for key, entry in bounds.items()))


def _bound(metric: str, entry: Any, name: str) -> Bound:
    if metric not in METRICS:
        raise UsageError(f"{name}: unknown metric {metric!r}; there are: {', '.join(METRICS)}")
    where = f"{name}, {metric}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: {entry!r} is not a table of {', '.join(BOUND_KEYS)}")
    _only(entry, BOUND_KEYS, where)
    bound = Bound(metric, entry.get(Bound(metric, 0).side, math.nan), entry.get("when", "always"))
    other = "at_most" if bound.side == "at_least" else "at_least"
    if other in entry or bound.side not in entry:
        raise UsageError(f"{where}: {METRICS[metric].better} is better, so its bound is {bound.side} alone")
    if not isinstance(bound.value, int | float) or isinstance(bound.value, bool) or not math.isfinite(bound.value):
        raise UsageError(f"{where}: {bound.side} {bound.value!r} is not a number")
    if bound.when not in get_args(When):
        raise UsageError(f"{where}: when {bound.when!r} is not one of {', '.join(get_args(When))}")
    return bound


def _only(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = next((key for key in raw if key not in known), None)
    if unknown is not None:
        raise UsageError(f"{where}: unknown key {unknown!r}; there are: {', '.join(known)}")


def _names() -> str:
    return ", ".join(shipped())


def _folder() -> Any:
    return resources.files("quantize") / "data" / "contracts"
