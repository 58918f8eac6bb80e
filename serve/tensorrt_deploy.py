"""How the parts of an engine artifact become Triton models, and whether the limits of requests fit their profiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kit.image_size import PIXELS_PER_TOKEN as PIXELS
from kit.ports import KV_PARTS, SERVED_PARTS, PartName
from kit.variants import Variant
from pipeline.request import Limits
from runtimes.trt.profiles import REFERENCE_TOKENS, Profile
from runtimes.trt.record import EngineRecord
from serve.settings import TensorRtModel


def models(record: EngineRecord, references: Sequence[PartName] = ()) -> dict[PartName, TensorRtModel]:
    """Choose the backend of each part.

    Triton's TensorRT backend loads a single plan that contains its weights. The denoiser and the model of images are
    python models of the kit that hold their engines, and so are parts whose weights are refitted, streamed or inputs,
    or that have a plan per profile, and all parts that TensorRT for RTX compiled: the backend is linked with TensorRT,
    which rejects them.
    """
    return {part: _model(record, part) for part in (*SERVED_PARTS, *references)}


def _model(record: EngineRecord, part: PartName) -> TensorRtModel:
    plans = record.plans_of(part)
    profiles = [profile for plan in plans for profile in plan.profiles]
    loadable = record.compiler == "tensorrt" and record.weights == "plan" and len(plans) == 1
    native = part in ("text_encoder", "vae_decoder") and loadable
    return TensorRtModel(
        backend="tensorrt_plan" if native else "python",
        profiles=len(profiles),
        max_batch=min(profile.axes["batch"].high for profile in profiles),
    )


def limits_refusal(record: EngineRecord, limits: Limits) -> str | None:
    """Return which image size the limits allow but no profile accepts, and the limit to change; None if all fit."""
    most, least = limits.max_pixels // PIXELS**2, (limits.min_side // PIXELS) ** 2
    most = min(most, (limits.max_side // PIXELS) ** 2)
    tokens = [p.axes["image_tokens"] for p in _profiles(record, "transformer")]
    low, high = min(r.low for r in tokens), max(r.high for r in tokens)
    gap = next((n for n in range(max(least, low), min(most, high) + 1) if not any(n in r for r in tokens)), None)
    if gap is not None:
        return f"no profile of the transformer accepts {gap} image tokens: build it with profiles that leave no gap"
    if least < low:
        return (
            f"--min-side {limits.min_side} is {least} image tokens, the engine accepts {low} or more: "
            f"--min-side {(math.isqrt(low - 1) + 1) * PIXELS}"
        )
    if most > high:
        return (
            f"--max-side {limits.max_side} and --max-pixels {limits.max_pixels} allow {most} image tokens, the engine "
            f"accepts {high} or fewer: --max-pixels {high * PIXELS**2}"
        )
    rows = [p.axes["latent_height"] for p in _profiles(record, "vae_decoder")]
    smallest, largest = min(r.low for r in rows) * PIXELS, max(r.high for r in rows) * PIXELS
    if limits.max_side > largest:
        return f"--max-side {limits.max_side} is more than the VAE's engine accepts: --max-side {largest}"
    if limits.min_side < smallest:
        return f"--min-side {limits.min_side} is less than the VAE's engine accepts: --min-side {smallest}"
    return None


def references_that_fit(record: EngineRecord, variant: Variant, limits: Limits) -> int:
    """Return how many references of a megapixel the engines accept beside the largest image."""
    if variant.family == "klein-kv":
        return max(profile.axes["ref_tokens"].high for profile in _profiles(record, KV_PARTS[1])) // REFERENCE_TOKENS
    largest = min(limits.max_pixels // PIXELS**2, (limits.max_side // PIXELS) ** 2)
    most = max(profile.axes["image_tokens"].high for profile in _profiles(record, "transformer"))
    return max(0, most - largest) // REFERENCE_TOKENS


def image_refusal(record: EngineRecord, width: int, height: int) -> str | None:
    """Say why the VAE encoder's engine cannot take an image of this size; None if it can."""
    profiles = _profiles(record, "vae_encoder")
    sizes = {"batch": 1, "latent_height": height // PIXELS, "latent_width": width // PIXELS}
    if any(profile.holds(sizes) for profile in profiles):
        return None
    sides = [profile.axes["latent_height"] for profile in profiles]
    low, high = min(side.low for side in sides) * PIXELS, max(side.high for side in sides) * PIXELS
    return f"{width} x {height} pixels are encoded; the engine of this deployment takes sides of {low} to {high}"


def _profiles(record: EngineRecord, part: PartName) -> list[Profile]:
    return [profile for plan in record.plans_of(part) for profile in plan.profiles]
