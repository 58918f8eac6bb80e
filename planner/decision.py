"""Summarize one plan as a row of the decision table: what each step from download to image takes, on which GPU.

Export and build times are measurements of this kit, and missing where there is none; all others are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kit.ports import PartName
from kit.recipes import RECIPES
from planner.builds import MEASURED, NOT_TIMED
from planner.memory import HOST_RESERVE, weight_bytes
from planner.plan import Plan
from planner.speed import calibration
from planner.text import BOLD, DIM, RED, colorize, number, span
from planner.timing import HOST_LINK, Range
from planner.weights import checkpoint_bytes
from planner.work import work

CALIBRATION_IMAGES = 166  # of `quantize calibrate` with its own prompts
# seconds of all parts in bf16 on 2 cores: benchmarks/results/export.json and export_variants.json, 2026-11-25
EXPORT_SECONDS: Mapping[str, float] = {"klein-4b": 24.8, "klein-9b-kv": 48.7, "dev": 33.2}
# seconds of all parts for five profiles, weights as inputs
BUILD_SECONDS: Mapping[tuple[str, str, str], float] = {
    (build.variant, build.gpu, build.recipe): build.seconds for build in MEASURED if build.weights == "inputs"
}


@dataclass(frozen=True)
class Decision:
    """One row; sizes in bytes, times in seconds, and None for what is unknown, not needed or does not fit."""

    variant: str
    gpu: str
    recipe: str | None
    why_not: str | None  # nothing fits
    download: int
    disk: int | None  # checkpoint, quantized artifact and plans; an export links the checkpoint's weights
    host_memory: int | None
    export: float | None  # measured; None: not measured for this variant
    calibrate: float | None  # None: the recipe needs no calibration
    build: float | None  # measured; None: not measured for this variant, GPU and recipe
    start: float | None  # at least: all weights over the link to the GPU
    gpu_memory: int | None
    image: Range | None
    usd_per_thousand: Range | None
    offer: str | None

    def facts(self) -> dict[str, Any]:
        """Return the row as plain data."""
        ranges = {
            name: value and [round(v, 5) for v in (value.low, value.mid, value.high)]
            for name, value in (("image", self.image), ("usd_per_thousand", self.usd_per_thousand))
        }
        return asdict(self) | ranges


def decide(answer: Plan) -> Decision:
    """Summarize a plan."""
    question, chosen = answer.question, answer.chosen
    variant, card = question.variant, question.gpu
    download, export = checkpoint_bytes(variant), EXPORT_SECONDS.get(variant.name)
    if chosen is None or chosen.timing is None:
        why = answer.tried[0].layout.reason
        nothing = dict.fromkeys(("disk", "host_memory", "calibrate", "build", "start", "gpu_memory", "image"))
        return Decision(variant.name, card.name, None, why, download, export=export, **nothing, **_price(answer))
    recipe = chosen.choice.recipe
    stored = sum(weight_bytes(part, variant, recipe) for part in chosen.layout.weights)
    new = stored if recipe.weight_bits < 16 else 0
    return Decision(
        variant=variant.name,
        gpu=card.name,
        recipe=recipe.name,
        why_not=None,
        download=download,
        disk=download + new + stored,
        host_memory=chosen.layout.host + HOST_RESERVE,
        export=export,
        calibrate=calibration_seconds(answer) if recipe.math in ("fp8", "int8") else None,
        build=BUILD_SECONDS.get((variant.name, card.name, recipe.name)),
        start=sum(chosen.layout.weights.values()) / HOST_LINK[card.generation],
        gpu_memory=chosen.layout.needed,
        image=chosen.timing.image,
        **_price(answer),
    )


def _price(answer: Plan) -> dict[str, Any]:
    costs = answer.costs
    if costs is None:
        return {"usd_per_thousand": None, "offer": None}
    return {"usd_per_thousand": costs.per_thousand, "offer": f"{'' if costs.listed else '~'}{costs.offer.offer}"}


def calibration_seconds(answer: Plan) -> float:
    """Estimate how long calibration takes on the GPU: images in bf16 with eager PyTorch, without the decoder.

    Weights that do not fit are streamed in every pass, as with `--offload layers`.
    """
    question, model, bf16 = answer.question, calibration(), RECIPES["bf16"]
    variant, card = question.variant, question.gpu
    shape = replace(question.shape, batch=1, references=0)
    usable = card.memory_bytes
    total = 0.0
    passes: tuple[tuple[PartName, int], ...] = (("text_encoder", 1), ("transformer", variant.steps))
    for part, count in passes:
        seconds = model.seconds(work(part, variant, bf16, shape), card, bf16, "eager")
        stored = weight_bytes(part, variant, bf16)
        moved = stored / HOST_LINK[card.generation] if stored > usable else 0.0
        total += count * max(seconds, moved)
    return CALIBRATION_IMAGES * total


def table(rows: Sequence[Decision], colour: bool = False) -> str:
    """Render the rows, one block per variant."""
    head = (
        f"{'variant':<15}{'gpu':<13}{'recipe':<14}{'download':>9}{'disk':>7}{'host':>6}{'export':>8}{'calibrate':>11}"
        f"{'build':>7}{'start':>8}{'memory':>8}  {'s per image':<21}{'$ per 1,000':<23}offer"
    )
    units = f"{'':<42}{'GB':>9}{'GB':>7}{'GB':>6}{'s':>8}{'min':>11}{'s':>7}{'s':>8}{'GB':>8}"
    lines = [colorize(head, BOLD, colour), colorize(units, DIM, colour)]
    lines += [_line(row, colour) for row in rows]
    return "\n".join(
        [
            *lines,
            "GB of 10^9 bytes. disk: checkpoint, quantized artifact and plans. host: memory of the host while serving.",
            f"export: measured on 2 cores. calibrate: an estimate for {CALIBRATION_IMAGES} images in bf16 on this GPU. "
            "start: at least, weights over the link to the GPU.",
            f"build: measured with TensorRT for RTX on 2 cores, without a GPU, weights as inputs; {NOT_TIMED}. "
            "~ a price seen on a market, not an offer.",
        ]
    )


def _line(row: Decision, colour: bool) -> str:
    name = f"{row.variant:<15}{row.gpu:<13}"
    if row.image is None:
        return colorize(f"{name}does not fit: {row.why_not}", RED, colour)
    minutes = None if row.calibrate is None else row.calibrate / 60
    cost = "-" if row.usd_per_thousand is None else span(row.usd_per_thousand, 2)
    return (
        f"{name}{row.recipe:<14}{_gb(row.download):>9}{_gb(row.disk):>7}{_gb(row.host_memory):>6}"
        f"{_figure(row.export):>8}{_figure(minutes):>11}{_figure(row.build):>7}{_figure(row.start):>8}"
        f"{_gb(row.gpu_memory):>8}  "
        f"{span(row.image):<21}{cost:<23}{row.offer or '-'}"
    )


def _gb(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.0f}" if count >= 1e10 else f"{count / 1e9:.1f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else number(value)
