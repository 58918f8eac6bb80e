"""Which runtime of this CPU steps an artifact's transformer fastest, by measurement."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

from kit.artifact import Manifest
from kit.engine import Engine
from kit.errors import UsageError
from kit.graph_runtimes import DEFAULT_RUNTIME, GRAPH_RUNTIMES, GraphRuntime
from kit.variants import Variant
from pipeline.denoise import Denoiser
from pipeline.request import Limits, check
from runtimes.open import open_parts

STEPS = 4  # timed, after one that is not
ROUNDS = 2  # visits of each runtime; of large artifacts one, since opening them takes longer than their steps
LARGE = 10**9  # bytes of weights
EXACT: tuple[GraphRuntime, ...] = ("ort-cpu", "openvino-fp32")  # their images differ in the last bits only

Seconds = Mapping[GraphRuntime, float]


def measure(artifact: Path, manifest: Manifest, limits: Limits, threads: int = 0) -> Seconds:
    """Return the median seconds of a step by runtime, for those that are installed; one row of the default size."""
    weights = sum(file.stat().st_size for file in (artifact / manifest.part("transformer").graph).parent.iterdir())
    found: dict[GraphRuntime, list[float]] = {}
    for _ in range(1 if weights > LARGE else ROUNDS):
        for runtime in GRAPH_RUNTIMES:
            if runtime != DEFAULT_RUNTIME and find_spec("openvino") is None:
                continue
            try:
                (engine,) = open_parts(artifact, manifest, ("transformer",), threads, runtime).values()
            except UsageError:  # no bf16 on this CPU
                continue
            found.setdefault(runtime, []).extend(_steps(engine, manifest, limits))
            del engine
    return {runtime: median(seconds) for runtime, seconds in found.items()}


def fastest(seconds: Seconds) -> GraphRuntime:
    """Return the fastest of the runtimes that compute as the artifact says; one that rounds more is never chosen."""
    return min((runtime for runtime in seconds if runtime in EXACT), key=lambda runtime: seconds[runtime])


def describe(seconds: Seconds) -> str:
    """Return a sentence on what was measured."""
    chosen = fastest(seconds)
    others = [f"{runtime} {value:.3g} s" for runtime, value in seconds.items() if runtime != chosen]
    told = f"{chosen}, {seconds[chosen]:.3g} s a step" + (f" ({', '.join(others)})" if others else "")
    if seconds.get("openvino-bf16", float("inf")) < seconds[chosen]:
        told += "; openvino-bf16 is faster and rounds: judge it with `quantize gate --runtime openvino-bf16`"
    if len(seconds) == 1:
        told += "; no other runtime is installed"
    return told


def _steps(engine: Engine, manifest: Manifest, limits: Limits) -> list[float]:
    variant: Variant = manifest.variant
    denoiser = Denoiser(variant, manifest.compute, engine)
    side = min(max(variant.image_size, limits.min_side), limits.max_side)
    request = check(
        {"prompt": "x", "seed": 1, "steps": STEPS + 1, "width": side, "height": side, "guidance": 1.0},
        variant,
        Limits(max_side=max(limits.max_side, side), max_pixels=max(limits.max_pixels, side * side)),
    )
    draw = np.random.default_rng(1).standard_normal((variant.text_tokens, variant.transformer.joint_dim))
    live = denoiser.admit(request, draw.astype(np.float32))
    seconds = []
    while not live.done:
        start = time.perf_counter()
        denoiser.step([live])
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
