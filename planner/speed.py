"""Predict how long a part takes on a GPU from its work and the rates that public measurements support.

A GPU computes no faster than a share of its dense rate and no faster than its power allows: small boards (L4: 72 W) are
limited by energy per operation, large ones by their tensor cores. In addition, activations pass through memory several
times in every block: about a hundred times in eager PyTorch, a few dozen times when operations are fused.

    seconds = linears / rate(recipe) + (attention x a + other) / rate(compute type) + passes x bytes / bandwidth
    rate(format) = min(share x dense rate, watts / joules per operation)
    image = text encoder + steps x transformer + VAE + seconds outside

share, joules (per generation; 8-bit operations take a fraction), a, passes and seconds outside are fitted to public
measurements (data/calibration.json, made by `python -m benchmarks plan --fit`). The only values not fitted are those
marked "not fitted".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from kit.gpus import Generation, Gpu
from kit.recipes import RECIPES, Precision, Recipe, recipe
from planner.boards import board
from planner.measurements import Measurement, Stack
from planner.memory import Shape
from planner.reference import model
from planner.work import Work, work

MEMORY_SHARE = 0.85  # of the bandwidth, for long streams; not fitted
CONV_PASSES: Mapping[Stack, float] = {"eager": 4, "fused": 2, "tensorrt": 2}  # norm, activation, residual; not fitted
CACHE_PASSES = 3  # cached keys and values are read, written behind those of the row, and read again; not fitted
PICO = 1e-12
TF32 = 0.5  # of the dense bf16 rate, as NVIDIA states from Ampere on: what TensorRT multiplies fp32 with


@dataclass(frozen=True)
class Calibration:
    """The fitted parameters, and how far measurements scatter around the predictions."""

    share: float  # of the dense rate that large products reach
    picojoules: Mapping[Generation, float]  # energy per 16-bit operation
    eight_bits: float  # energy of an 8-bit operation relative to a 16-bit one
    attention: float  # cost of an attention operation relative to one of a linear layer
    passes: Mapping[Stack, float]
    tensorrt: float  # duration with TensorRT relative to other fused stacks
    outside: float  # seconds per image outside the passes: tokenizer, scheduler, writing the file
    low: float  # the range: 10th and 90th percentile of measured / predicted, for sources left out of the fit
    high: float

    def rate(self, gpu: Gpu, precision: Precision) -> float:
        """Return the operations per second that a GPU sustains in a format."""
        if precision == "fp32":
            return TF32 * self.rate(gpu, "bf16") if gpu.has("bf16") else self.share * gpu.dense["fp32"]
        # no public point is on Turing, so it takes the energy of the generation after it; not fitted
        generation = "ampere" if gpu.generation == "turing" else gpu.generation
        energy = self.picojoules[generation] * (self.eight_bits if precision in ("fp8", "int8") else 1.0)
        return min(self.share * gpu.dense[precision], gpu.watts / (energy * PICO))

    def seconds(self, work: Work, gpu: Gpu, recipe: Recipe, stack: Stack) -> float:
        """Predict the duration of one pass."""
        memory = MEMORY_SHARE * gpu.bandwidth
        linears = max(work.linears / self.rate(gpu, recipe.math), work.weight_bytes / memory)
        rest = (work.attention * self.attention + work.other) / self.rate(gpu, recipe.compute)
        moved = self.passes[stack] * work.pass_bytes + CONV_PASSES[stack] * work.conv_bytes
        moved = (moved + CACHE_PASSES * work.cache_bytes) / memory
        return (linears + rest + moved) * (self.tensorrt if stack == "tensorrt" else 1.0)


@cache
def calibration() -> Calibration:
    """Read the fitted calibration."""
    raw = json.loads(resources.files("planner.data").joinpath("calibration.json").read_text())
    return Calibration(**raw["calibration"])


@dataclass(frozen=True)
class Pass:
    """A part's work, run a number of times on a GPU with a recipe."""

    work: Work
    times: int
    gpu: Gpu
    recipe: Recipe


def ceiling_seconds(work: Work, gpu: Gpu, recipe: Recipe) -> float:
    """Return the roofline: the time at the full dense rate or the full bandwidth, whichever is longer."""
    compute = work.linears / _dense(gpu, recipe.math) + (work.attention + work.other) / _dense(gpu, recipe.compute)
    return max(compute, work.weight_bytes / gpu.bandwidth)


def _dense(gpu: Gpu, precision: Precision) -> float:
    """Return the dense rate of the tensor cores in a format; fp32 is multiplied as TF32 where there is bf16."""
    tf32 = precision == "fp32" and gpu.has("bf16")
    return TF32 * gpu.dense["bf16"] if tf32 else gpu.dense[precision]


def predict(point: Measurement, fitted: Calibration) -> float:
    """Predict the value of a published measurement."""
    return predict_passes(point, passes_of(point), fitted)


def predict_passes(point: Measurement, passes: Sequence[Pass], fitted: Calibration) -> float:
    """Predict a measurement from its passes."""
    total = sum(p.times * fitted.seconds(p.work, p.gpu, p.recipe, point.stack) for p in passes)
    return total + (fitted.outside if point.scope == "image" else 0.0)


def passes_of(point: Measurement) -> list[Pass]:
    """List the passes of a measurement; parts that were not quantized stay in bf16."""
    variant, gpu, chosen = model(point.model), board(point.gpu), recipe(point.recipe)
    shape = Shape(point.width, point.height)
    passes = [Pass(work("transformer", variant, chosen, shape), point.steps, gpu, chosen)]
    if point.scope == "image":
        plain = RECIPES["bf16"]
        others: tuple[Literal["text_encoder", "vae_decoder"], ...] = ("text_encoder", "vae_decoder")
        passes += [Pass(work(part, variant, plain, shape), 1, gpu, plain) for part in others]
    return passes
