"""How ONNX graphs become Triton models on a GPU, run by a provider of ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path

from kit.cuda_device import this_machine
from kit.engine import Engine
from kit.errors import UsageError
from kit.image_size import PIXELS_PER_TOKEN as PIXELS
from kit.ports import PartName
from kit.providers import provider
from kit.recipes import recipe
from planner.memory import Shape, activation_bytes, weight_bytes
from runtimes.ort.providers import Plan, cache_folder, merged
from runtimes.trt.profiles import REFERENCE_TOKENS, Profile, Sizing, derive
from serve.settings import Runtime, Settings

PREFIX = "ort-"
SPARE = 1.25  # of the planner's memory: an arena that is too small fails, one that is too large takes from the others


def provider_name(runtime: Runtime) -> str:
    """Return the provider of a runtime: ort-cuda is cuda."""
    return runtime.removeprefix(PREFIX)


def profile(part: PartName, settings: Settings) -> Profile:
    """Return the sizes that the limits of a deployment allow for a part; TensorRT compiles for these."""
    limits, tuning = settings.limits, settings.tuning
    largest = min(limits.max_side, math.isqrt(limits.max_pixels) // PIXELS * PIXELS)
    sides = sorted({side for side in (1024,) if limits.min_side <= side <= largest} | {largest})
    rows = {"text_encoder": tuning.text_batch, "transformer": tuning.max_rows}.get(part, tuning.vae_batch)
    if part in ("vae_decoder", "vae_encoder"):
        # bounds both sides, and a side may be longer than that of the largest square
        sides = sorted({*sides, limits.max_side})
    references = _references(settings)
    return merged(derive(settings.ports[part], Sizing(tuple(sides), rows, references, limits.min_side)))


def _references(settings: Settings) -> int:
    taken = min(settings.limits.max_references, settings.variant.max_references)
    return taken if settings.takes_references else 0


def memory_limit(part: PartName, settings: Settings, name: str) -> int:
    """Return the bytes of a part's arena by the planner: its weights, and activations at the limits."""
    limits, batch = settings.limits, profile(part, settings).axes["batch"].high
    side = math.isqrt(limits.max_pixels)
    needed = weight_bytes(part, settings.variant, recipe(name))
    shape = Shape(side, side, batch, _references(settings) * REFERENCE_TOKENS)
    needed += activation_bytes(part, settings.variant, recipe(name), shape)
    return int(SPARE * needed)


def open_part(graph: Path, part: PartName, settings: Settings) -> Engine:
    """Open a part on the GPU; raises UsageError if this machine or its ONNX Runtime has none."""
    import onnxruntime as ort

    from runtimes.ort.bound import BoundEngine
    from runtimes.trt.cuda import Cuda

    device, row = this_machine().device, provider(provider_name(settings.runtime))
    if device is None:
        raise UsageError(f"{settings.runtime} needs a GPU, and nvidia-smi lists none on this machine")
    if row.targets and device.capability not in row.targets:
        known = ", ".join(row.targets)
        raise UsageError(f"{row.title} runs on compute capability {known}; {device.title} has {device.capability}")
    limit = memory_limit(part, settings, settings.recipe) if row.name != "tensorrt-rtx" else None
    plan = Plan(profile(part, settings), cache_folder(graph, device, str(ort.__version__)), limit)
    plan.cache.mkdir(exist_ok=True)
    return BoundEngine(graph, settings.ports[part], row, plan, Cuda())
