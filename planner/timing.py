"""Estimate the times of a laid-out variant: the seconds of every part as a range, and the time the GPU is busy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kit.gpus import GB, Generation, Gpu
from kit.ports import PartName
from kit.recipes import RECIPES, Recipe
from kit.variants import Variant
from planner import flops
from planner.layout import Choice, Layout
from planner.measurements import EIGHT_BITS, measured_cells
from planner.memory import Shape, rows, weight_bytes
from planner.parts import reads_once, step_part
from planner.speed import Calibration, ceiling_seconds
from planner.work import Work, work

# Host to GPU over 16 lanes of PCIe 3, 4 or 5 at about 80 %; not fitted.
HOST_LINK: Mapping[Generation, float] = {
    "turing": 12.5 * GB,
    "ampere": 25.0 * GB,
    "ada": 25.0 * GB,
    "hopper": 50.0 * GB,
    "blackwell": 50.0 * GB,
}
# int8 operations per second and core: 69 GFLOP/s in fp32 measured on one core with AVX-512 (2026-11-25), times 4.4 for
# int8 (design of the recipes), times 60 % when all cores are busy; not fitted.
CPU_RATE = 69e9 * 4.4 * 0.6


@dataclass(frozen=True)
class Range:
    """A value that is not known exactly: a best estimate between two ends."""

    low: float
    mid: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.mid <= self.high, f"an estimate outside its own range: {self}"

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.mid * factor, self.high * factor)

    def per(self, count: float) -> Range:
        """Convert seconds to a count per `count` seconds."""
        return Range(count / self.high, count / self.mid, count / self.low)


NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Timing:
    """Seconds of one batch of images."""

    text: Range
    references: Range  # VAE encoder, and the keys and values of klein-kv
    step: Range
    decode: Range
    image: Range  # latency of the batch, from prompt to file
    busy: Range  # the part of it during which the GPU cannot do other work
    ceiling: float  # of one step: the roofline at the full dense rate, or that of the layers of a built engine
    model_flops: float  # of one step

    @property
    def step_share(self) -> float:
        """Return the fraction of the busy time that one step takes."""
        return self.step.mid / self.busy.mid

    def utilisation(self, gpu: Gpu, choice: Choice) -> float:
        """Return the fraction of the roofline that the estimated step reaches."""
        return self.ceiling / self.step.mid


def times(
    variant: Variant,
    gpu: Gpu,
    choice: Choice,
    layout: Layout,
    shape: Shape,
    steps: int,
    cores: int,
    model: Calibration,
    step_seconds: float | None = None,
    roofline: float | None = None,
) -> Timing:
    """Estimate the times of a batch with TensorRT engines; a measured step is used as it is.

    No estimate of a step is below `roofline`, that of the layers of a built engine.
    """

    def part(name: PartName) -> Range:
        return _part(work(name, variant, choice.recipe, shape), gpu, choice.recipe, model)

    name = step_part(variant, shape.references)
    transformer = work(name, variant, choice.recipe, shape)
    step = _streamed(part(name), layout.streamed / HOST_LINK[gpu.generation])
    if roofline is not None:
        step = Range(*(max(end, roofline) for end in (step.low, step.mid, step.high)))
    if step_seconds is not None:
        step = Range(step_seconds, step_seconds, step_seconds)
    decode, references, text, busy_text = part("vae_decoder"), NOTHING, NOTHING, NOTHING
    if shape.references:
        references = _part(work("vae_encoder", variant, choice.recipe, shape.encoded), gpu, choice.recipe, model)
    if reads_once(variant, shape.references):
        moved = layout.streamed_once / HOST_LINK[gpu.generation]
        references += _streamed(part("transformer_extract"), moved)
    match choice.text_encoder:
        case "resident":
            text = busy_text = part("text_encoder")
        case "evicted":
            moved = weight_bytes("text_encoder", variant, choice.recipe) / HOST_LINK[gpu.generation]
            text = busy_text = _streamed(part("text_encoder"), moved)
        case "own-gpu":
            text = part("text_encoder")
        case "cpu":
            count = rows(variant, shape.batch) * flops.text_encoder(variant.text_encoder, variant.text_tokens).total
            text = Range(count / CPU_RATE / cores / 1.5, count / CPU_RATE / cores, count / CPU_RATE / cores * 1.5)
        case "cache":
            pass
    painted = references + step.times(steps) + decode
    busy = busy_text + painted
    image = text + painted + outside(model)
    ceiling = ceiling_seconds(transformer, gpu, choice.recipe) if roofline is None else roofline
    return Timing(text, references, step, decode, image, busy, ceiling, transformer.flops)


def outside(model: Calibration) -> Range:
    """Return the seconds of an image outside the GPU: tokenizer, scheduler, writing the file."""
    return Range(model.outside / 2, model.outside, model.outside * 2)


def _part(passed: Work, gpu: Gpu, chosen: Recipe, model: Calibration) -> Range:
    """Estimate one pass; the slow end is wider where there are no measurements.

    If no public point covers 8-bit products on a generation, the slow end is the time of bf16, without any gain. If
    only weights are quantized, the slow end adds the traffic of bf16 weights, written and read once per pass.
    """
    seconds = model.seconds(passed, gpu, chosen, "tensorrt")
    slow = seconds * model.high
    if chosen.math in ("fp8", "int8") and (gpu.generation, EIGHT_BITS) not in measured_cells():
        slow = max(slow, model.seconds(passed, gpu, RECIPES["bf16"], "tensorrt") * model.high)
    if chosen.weight_bits < 16 and chosen.math == chosen.compute:
        slow += 2 * passed.weight_bytes * 16 / chosen.weight_bits / gpu.bandwidth
    return Range(seconds * model.low, seconds, slow)


def _streamed(compute: Range, moved: float) -> Range:
    """Add the transfer of weights: hidden behind the computation at best, before it at worst.

    The estimate adds a tenth to the longer of the two, and never exceeds one after the other.
    """
    if not moved:
        return compute
    mid = min(max(compute.mid, moved) * 1.1, compute.mid + moved)
    return Range(max(compute.low, moved), mid, compute.high + moved)
