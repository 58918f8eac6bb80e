"""Which references a deployment takes: those that its artifact can encode and its engines accept."""

from __future__ import annotations

from dataclasses import replace

from kit.artifact import Manifest
from kit.errors import UsageError
from kit.ports import KV_PARTS, PartName
from kit.variants import Variant
from pipeline.request import Limits
from runtimes.trt.record import EngineRecord
from serve import tensorrt_deploy


def limits_of(manifest: Manifest, record: EngineRecord | None, limits: Limits) -> Limits:
    """Add to limits why the artifact takes no references, if so; an artifact that takes fewer raises UsageError."""
    if not limits.max_references:
        return limits
    if manifest.kind == "aoti":
        why = "this deployment runs packages of fixed sizes and takes no references; deploy graphs or engines"
        return replace(limits, no_references=why)
    parts: tuple[PartName, ...] = parts_of(manifest.variant, limits)
    for part in parts:
        if part not in manifest.parts:
            name = "VAE encoder" if part == "vae_encoder" else part
            return replace(limits, no_references=f"this deployment has no {name}; deploy an artifact that has one")
    if record is None:
        return limits
    fit = tensorrt_deploy.references_that_fit(record, manifest.variant, limits)
    if not fit:
        why = "the engines of this deployment were built without references; build them with --references N"
        return replace(limits, no_references=why)
    if fit < min(limits.max_references, manifest.variant.max_references):
        raise UsageError(
            f"--max-references {limits.max_references}: the engines accept {fit} beside the largest image: "
            f"--max-references {fit}, or build them with --references {manifest.variant.max_references}"
        )
    return limits


def parts_of(variant: Variant, limits: Limits) -> tuple[PartName, ...]:
    """List the parts that references need, of a deployment that takes some."""
    if not limits.max_references or limits.no_references:
        return ()
    return ("vae_encoder", *(KV_PARTS if variant.family == "klein-kv" else ()))


def describe(variant: Variant, limits: Limits) -> str:
    """Say in a few words which references a deployment takes."""
    if limits.no_references:
        return f"none: {limits.no_references}"
    most = min(limits.max_references, variant.max_references)
    return f"at most {most} a request" if most else "none"
