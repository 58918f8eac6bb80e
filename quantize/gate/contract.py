"""Quality contracts: read a file of bounds and check that the measured intervals are within them.

    format = 1
    about = "the reason for these bounds"
    least_prompts = 32

    [bounds.ssim]
    at_least = 0.9
    tail = 0.8

    [bounds.judge_change]
    at_least = -0.01
    when = "measured"
    least_prompts = 200

A bound must hold for the whole 95 % interval, not only for the mean. `tail` bounds the worst 5 % of the pairs: a fault
in few images moves no mean. A metric that is named in a contract but was not measured breaks the contract, unless its
bound has `when = "measured"`. A bound's own `least_prompts` are needed only if its metric is measured: counted answers
move in steps, so an interval over few prompts cannot prove a small bound.
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
SAMPLE = "sample"  # folder of the contracts whose bounds were measured on the sample
When = Literal["always", "measured"]
KEYS = ("format", "about", "least_prompts", "bounds")
BOUND_KEYS = ("at_least", "at_most", "when", "tail", "least_prompts")


@dataclass(frozen=True)
class Bound:
    """The bound of one metric: at least `value` if higher is better, at most `value` if lower is better."""

    metric: str
    value: float
    when: When = "always"
    tail: float | None = None  # bound of the quantile that 5 % of the pairs are worse than
    least_prompts: int = 1  # where the metric is measured

    @property
    def side(self) -> Literal["at_least", "at_most"]:
        return "at_least" if METRICS[self.metric].better == "higher" else "at_most"

    def __str__(self) -> str:
        return f"{self.metric} {self.side.replace('_', ' ')} {self.value:g}"

    def fault(self, found: Interval) -> str | None:
        """Return how the bound is broken, or None if it holds."""
        sign = 1 if self.side == "at_least" else -1
        worse = found.low if self.side == "at_least" else found.high
        if sign * (worse - self.value) >= 0:
            return None
        message = f"{self}: found {found.mean:.4g}, between {found.low:.4g} and {found.high:.4g} with 95 % confidence"
        if sign * (found.mean - self.value) >= 0:
            message += f"; the mean meets it, but {found.prompts} prompts are too few to prove it"
        return message

    def tail_fault(self, found: float) -> str | None:
        """Return how the bound of the worst pairs is broken, or None if it holds or there is none."""
        sign = 1 if self.side == "at_least" else -1
        if self.tail is None or sign * (found - self.tail) >= 0:
            return None
        return f"{self.metric} {self.side.replace('_', ' ')} {self.tail:g} in 95 % of the pairs: found {found:.4g}"


@dataclass(frozen=True)
class Contract:
    """Bounds, and the smallest number of prompts they may be judged on."""

    name: str
    about: str
    least_prompts: int
    bounds: tuple[Bound, ...]

    def without(self, *metrics: str) -> Contract:
        """Return the contract without the bounds of metrics that cannot exist in a comparison."""
        return replace(self, bounds=tuple(bound for bound in self.bounds if bound.metric not in metrics))

    def gaps(self, measurable: Collection[str], reasons: Mapping[str, str], prompts: int) -> list[str]:
        """Return what makes it impossible to judge the contract, whatever the images look like."""
        gaps = []
        if prompts < self.least_prompts:
            gaps.append(f"{prompts} prompts are used, the contract requires at least {self.least_prompts}")
        for bound in self.bounds:
            if bound.when == "always" and bound.metric not in measurable:
                gaps.append(f"{bound}: not measured, because {reasons.get(bound.metric, 'no prompt requires it')}")
            if bound.metric in measurable and prompts < bound.least_prompts:
                gaps.append(
                    f"{bound}: {prompts} prompts are used, and its interval needs at least {bound.least_prompts}"
                )
        return gaps

    def faults(
        self,
        found: Mapping[str, Interval],
        reasons: Mapping[str, str],
        prompts: int,
        tails: Mapping[str, float] | None = None,
    ) -> list[str]:
        """Return one sentence per gap and per broken bound; `tails` are the values that 5 % of the pairs are beyond."""
        broken = [bound.fault(found[bound.metric]) for bound in self.bounds if bound.metric in found]
        broken += [bound.tail_fault(tails[bound.metric]) for bound in self.bounds if tails and bound.metric in tails]
        return self.gaps(found, reasons, prompts) + [fault for fault in broken if fault]


def shipped() -> list[str]:
    """Return the names of the kit's contracts: recipes, and SAMPLE/RECIPE for those measured on the sample."""
    folders = (("", _folder()), (f"{SAMPLE}/", _folder() / SAMPLE))
    files = [(prefix, file.name) for prefix, folder in folders for file in folder.iterdir()]
    return sorted(f"{prefix}{name.removesuffix('.toml')}" for prefix, name in files if name.endswith(".toml"))


def of_recipe(recipe: str, sample: bool = False) -> Contract:
    """Load the kit's contract for a recipe; for the sample, the one that was measured on it, if there is one.

    Raises UsageError when there is none.
    """
    if sample and f"{SAMPLE}/{recipe}" in shipped():
        recipe = f"{SAMPLE}/{recipe}"
    if recipe not in shipped():
        raise UsageError(
            f"there is no contract for the recipe {recipe!r}; there are: {_names()}; choose one or a file with "
            f"--contract"
        )
    return parse((_folder() / f"{recipe}.toml").read_text(encoding="utf-8"), "toml", recipe)


def find(word: str) -> Contract:
    """Load the contract given with --contract: a file, or the name of one of the kit's."""
    if word in shipped():
        return of_recipe(word)
    if not Path(word).is_file():
        raise UsageError(f"--contract {word}: no such file, and no contract of that name; there are: {_names()}")
    return load(Path(word))


def load(path: Path) -> Contract:
    """Load a contract from TOML, or from JSON if the suffix is .json; raises UsageError that names the invalid key."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not valid UTF-8") from None
    return replace(parse(content, "json" if path.suffix == ".json" else "toml", str(path)), name=path.name)


def parse(content: str, form: Literal["toml", "json"], name: str) -> Contract:
    """Parse the text of a contract; unknown keys and metrics are errors."""
    try:
        raw = tomllib.loads(content) if form == "toml" else json.loads(content)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{name}: not valid {form.upper()} ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UsageError(f"{name}: format is not {FORMAT}; no other format is supported")
    _only(raw, KEYS, name)
    bounds, least, about = raw.get("bounds"), _least(raw, name), raw.get("about", "")
    if not isinstance(bounds, dict) or not bounds:
        raise UsageError(f"{name}: bounds is missing or empty; a contract needs at least one bound")
    if not isinstance(about, str):
        raise UsageError(f"{name}: about {about!r} is not text")
    return Contract(name, about, least, tuple(_bound(key, entry, name) for key, entry in bounds.items()))


def _least(raw: Mapping[str, Any], where: str) -> int:
    least = raw.get("least_prompts", 1)
    if not isinstance(least, int) or isinstance(least, bool) or least < 1:
        raise UsageError(f"{where}: least_prompts {least!r} is not a positive whole number")
    return least


def _bound(metric: str, entry: Any, name: str) -> Bound:
    if metric not in METRICS:
        raise UsageError(f"{name}: unknown metric {metric!r}; there are: {', '.join(METRICS)}")
    where = f"{name}, {metric}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: {entry!r} is not a table with the keys {', '.join(BOUND_KEYS)}")
    _only(entry, BOUND_KEYS, where)
    value, tail = entry.get(Bound(metric, 0).side, math.nan), entry.get("tail")
    bound = Bound(metric, value, entry.get("when", "always"), tail, _least(entry, where))
    other = "at_most" if bound.side == "at_least" else "at_least"
    if other in entry or bound.side not in entry:
        raise UsageError(f"{where}: {METRICS[metric].better} is better, so its only bound is {bound.side}")
    if not isinstance(bound.value, int | float) or isinstance(bound.value, bool) or not math.isfinite(bound.value):
        raise UsageError(f"{where}: {bound.side} {bound.value!r} is not a number")
    if tail is not None and (not isinstance(tail, int | float) or isinstance(tail, bool) or not math.isfinite(tail)):
        raise UsageError(f"{where}: tail {tail!r} is not a number")
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
