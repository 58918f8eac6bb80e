"""Measure rungs of the ladder: quantize an artifact with each and compare its images with the reference's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from kit.errors import UsageError
from kit.ports import QUANTIZED_PARTS
from kit.recipes import Rule, read_recipe, write_recipe
from quantize.apply.apply import apply
from quantize.calibration.record import Record
from quantize.gate.contract import Bound
from quantize.gate.drawing import Canvas, Drawing, Generate, Measure, Side, compare, open_generator
from quantize.gate.intervals import Interval, interval
from quantize.gate.measures import FACTORIES, Scope
from quantize.gate.metrics import METRICS
from quantize.prompt_set import Prompt

Tick = Callable[[str], None]  # called for every image with the name of its recipe


@dataclass(frozen=True)
class Measured:
    """Metrics of the images of one recipe, and the size of its text encoder and transformer."""

    metrics: Mapping[str, Interval]
    latents: float  # relative squared error of the final latents, which a search predicts: 2 (1 - cosine)
    bytes: int

    def faults(self, bounds: Sequence[Bound]) -> list[str]:
        """Return how the bounds are broken; a bound must hold for the whole interval, as in the gate."""
        return [fault for bound in bounds if (fault := bound.fault(self.metrics[bound.metric]))]


@dataclass
class Studio:
    """Generates images with recipes of one artifact; the reference's images are generated once and reused."""

    reference: Path
    base: str  # recipe
    record: Record | None
    prompts: Sequence[Prompt]
    seeds: int
    canvas: Canvas
    measures: Sequence[Measure]
    scratch: Path
    threads: int = 0
    tick: Tick = lambda what: None
    report: Tick = lambda line: None  # called with a line for every recipe
    shown: dict[tuple[str, int], Drawing] = field(default_factory=dict)

    def draw(self, name: str, rules: tuple[Rule, ...]) -> Measured:
        """Apply a recipe, generate images and measure; the artifact is removed, the recipe stays in `scratch`."""
        file, candidate, images = self.scratch / f"{name}.json", self.scratch / name, self.scratch / "images"
        write_recipe(file, self.base, name, rules)
        apply(self.reference, candidate, read_recipe(file), self.record)
        weights = sum(
            path.stat().st_size for part in QUANTIZED_PARTS for path in (candidate / part).glob("*.safetensors")
        )
        generators: dict[Side, Callable[[], Generate]] = {
            "reference": self._reference,
            "candidate": lambda: open_generator(candidate, self.canvas, self.threads),
        }
        images.mkdir()
        try:
            pairs = compare(generators, self.prompts, self.seeds, self.measures, images, lambda side: self.tick(name))
        finally:
            shutil.rmtree(images)
            shutil.rmtree(candidate)
        found: dict[str, Interval] = {}
        for metric in METRICS.values():
            values: dict[str, list[float]] = {}
            for pair in pairs:
                if metric.name in pair.scores:
                    values.setdefault(pair.prompt.id, []).append(pair.scores[metric.name].value)
            if values:
                found[metric.name] = interval(list(values.values()), metric.grain)
        psnr = found["psnr"]
        self.report(f"{name}: psnr {psnr.mean:.2f} dB ({psnr.low:.2f} to {psnr.high:.2f}), {weights / 1e6:.1f} MB")
        return Measured(found, fmean(2 * (1 - pair.cosines[-1]) for pair in pairs), weights)

    def _reference(self) -> Generate:
        generators: list[Generate] = []

        def generate(prompt: str, seed: int) -> Drawing:
            if (prompt, seed) not in self.shown:
                if not generators:
                    generators.append(open_generator(self.reference, self.canvas, self.threads))
                self.shown[prompt, seed] = generators[0](prompt, seed)
            return self.shown[prompt, seed]

        return generate


def measures_for(scope: Scope, bounds: Sequence[Bound]) -> list[Measure]:
    """Return the similarity measures and those the bounds need; raises UsageError if one is not available."""
    made = []
    for names, factory in FACTORIES.items():
        asked = next((bound for bound in bounds if bound.metric in names), None)
        if asked is None and "psnr" not in names:
            continue
        measure = factory(scope)
        if isinstance(measure, str):
            raise UsageError(f"--meet {asked}: it cannot be measured here, because {measure}")
        made.append(measure)
    return made


def bisect(low: int, high: int, meets: Callable[[int], bool]) -> int:
    """Return the first rung that meets the bounds, given that `high` does and `low` does not, by bisection."""
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle
    return high


def plain(measured: Measured) -> dict[str, Any]:
    """Return measurements as plain data."""
    return {
        "metrics": {
            name: {"mean": found.mean, "low": found.low, "high": found.high} for name, found in measured.metrics.items()
        },
        "latents": measured.latents,
        "bytes": measured.bytes,
    }
