"""Estimate what a build of engines takes: seconds and memory of the machine that compiles, and disk.

The estimates rest on the builds in MEASURED, by TensorRT for RTX on two cores without a GPU. Its time grows with the
layers of a network times their profiles, and with the weights that go into plans; its memory with the largest part.
TensorRT times kernels on the GPU, and no such build has been measured, so there is no estimate of its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kit.compilers import CompilerName, WeightMode
from kit.ports import PartName
from kit.recipes import Recipe
from kit.variants import Variant
from planner.convolutions import decoder_layers, encoder_layers
from planner.memory import gigabytes, weight_bytes

# Rates that the measured builds lie between; layers are counted once per profile.
LAYER_SECONDS = (0.019, 0.047)
GB_SECONDS = (8.0, 29.0)  # per GB of weights in plans: processor time alone, and elapsed time with other work beside
LAYER_BYTES = 46_000  # of a plan, without weights
MEMORY, LAYER_MEMORY = 0.66e9, 220_000  # of the process; per layer and profile of the largest part
WEIGHT_COPIES = 2  # of the largest part in memory, if its weights go into the plan
_TEXT_LAYER, _DOUBLE, _SINGLE, _CONVOLUTION = 14, 23, 10, 5  # layers of the compiled network per layer of the model


@dataclass(frozen=True)
class MeasuredBuild:
    """One build of all four parts for five profiles, from benchmarks/results/compile.json."""

    variant: str
    gpu: str
    recipe: str
    weights: WeightMode
    seconds: float


MEASURED = (
    MeasuredBuild("klein-4b", "l4", "fp8", "inputs", 92.3),
    MeasuredBuild("klein-4b", "l4", "bf16", "inputs", 70.0),
    MeasuredBuild("klein-4b", "a10g", "int8", "inputs", 166.4),
    MeasuredBuild("klein-9b", "l4", "fp8", "inputs", 181.7),
    MeasuredBuild("klein-4b", "l4", "fp8", "plan", 343.8),
    MeasuredBuild("klein-4b", "a10g", "int8", "plan", 321.2),
)
BASIS = (
    f"estimated from {len(MEASURED)} builds of klein-4b and klein-9b by TensorRT for RTX 1.7.1 on 2 cores "
    "(benchmarks/results/compile.json, 2026-11-27)"
)
NOT_TIMED = "a build by TensorRT, which times kernels on the GPU, has not been measured yet"


@dataclass(frozen=True)
class Planned:
    """What is compiled of one part."""

    plans: int
    profiles: int  # of all plans together


@dataclass(frozen=True)
class Estimate:
    """What a build takes."""

    seconds: tuple[float, float] | None  # on two cores; None: not measured for this compiler
    memory: int  # bytes of host memory
    disk: int  # bytes of plans

    def describe(self) -> str:
        """Say it in two lines, with what it rests on."""
        time = "time unknown" if self.seconds is None else f"{_minutes(self.seconds)} on 2 cores"
        why = f"; {NOT_TIMED}" if self.seconds is None else ""
        return f"takes about: {time}, {_size(self.memory)} of memory, {_size(self.disk)} of disk\n  {BASIS}{why}"

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        seconds = None if self.seconds is None else [round(end, 1) for end in self.seconds]
        return {"seconds": seconds, "memory_bytes": self.memory, "disk_bytes": self.disk, "basis": BASIS}


def estimate(
    variant: Variant, recipe: Recipe, parts: Mapping[PartName, Planned], weights: WeightMode, compiler: CompilerName
) -> Estimate:
    """Estimate the build of parts."""
    inside = weights in ("plan", "stream")
    stored = {part: weight_bytes(part, variant, recipe) if inside else 0 for part in parts}
    layers = {part: network_layers(part, variant) * planned.profiles for part, planned in parts.items()}
    in_plans = sum(stored[part] * planned.plans for part, planned in parts.items())
    seconds = None
    if compiler == "tensorrt-rtx":
        low, high = (
            rate * sum(layers.values()) + per_gb * in_plans / 1e9
            for rate, per_gb in zip(LAYER_SECONDS, GB_SECONDS, strict=True)
        )
        seconds = low, high
    memory = max(MEMORY + LAYER_MEMORY * layers[part] + WEIGHT_COPIES * stored[part] for part in parts)
    return Estimate(seconds, round(memory), in_plans + LAYER_BYTES * sum(layers.values()))


def _minutes(seconds: tuple[float, float]) -> str:
    unit, name = (1, "seconds") if seconds[1] < 120 else (60, "minutes")
    low, high = (f"{end / unit:.2g}" for end in seconds)
    return f"{low} to {high} {name}"


def _size(count: int) -> str:
    return gigabytes(count) if count >= 1e8 else f"{count / 1e6:.0f} MB"


def network_layers(part: PartName, variant: Variant) -> int:
    """Count the layers of a part's compiled network, within a tenth for most parts."""
    sizes = variant.transformer
    match part:
        case "text_encoder":
            return _TEXT_LAYER * max(variant.text_encoder.taps)
        case "vae_encoder":
            return _CONVOLUTION * len(encoder_layers(variant.vae))
        case "vae_decoder":
            return _CONVOLUTION * len(decoder_layers(variant.vae))
        case _:
            return _DOUBLE * sizes.double_blocks + _SINGLE * sizes.single_blocks
