"""How AOTInductor packages become Triton models: which requests they can run, and what lies beside the packages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kit.artifact import Manifest
from kit.errors import UsageError
from pipeline.request import Limits
from runtimes.aoti.record import compiled_sizes


def limits_of(artifact: Path, manifest: Manifest, limits: Limits) -> Limits:
    """Narrow limits to the sizes that were compiled, because a package runs no other.

    Raises UsageError if no compiled size is within the limits.
    """
    compiled = compiled_sizes(artifact, manifest)
    sizes = tuple(
        (width, height)
        for width, height in compiled
        if limits.min_side <= min(width, height)
        and max(width, height) <= limits.max_side
        and width * height <= limits.max_pixels
    )
    if not sizes:
        words = ", ".join(f"{width}x{height}" for width, height in compiled) or "none"
        raise UsageError(
            f"{artifact}: no image size that was compiled is within the limits; compiled: {words}. Compile others with "
            "`export aoti --sizes`, or change --min-side, --max-side or --max-pixels"
        )
    return replace(limits, sizes=sizes)


def on_gpu(manifest: Manifest) -> bool:
    return str(manifest.options["device"]).startswith("cuda")
