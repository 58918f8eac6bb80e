"""What an engine artifact says about itself: bytes of its plans, activation memory and roofline, for the planner.

The numbers are the compiler's, from the account that `export engine` puts into the manifest. Activation memory is that
of the largest profile, because an engine allocates it once for all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.artifact import Manifest, read_manifest
from kit.errors import ArtifactError, UsageError
from kit.ports import ALL_PARTS, PartName
from kit.variants import Variant


@dataclass(frozen=True)
class BuiltPart:
    """The plans of one part."""

    plan_bytes: int
    activations: int | None  # None: the compiler did not say
    roofline: float | None  # seconds of one run at `sizes`
    sizes: Mapping[str, int]  # of the named axes


@dataclass(frozen=True)
class Built:
    """An engine artifact; parts that it lacks are estimated."""

    folder: str
    variant: Variant
    gpu: str
    recipe: str
    holds_weights: bool  # in the plans
    parts: Mapping[PartName, BuiltPart]

    def stored(self, part: PartName, estimate: int) -> int:
        """Return the bytes of a part without activations; `estimate` is that of its weights."""
        if part not in self.parts:
            return estimate
        return self.parts[part].plan_bytes + (0 if self.holds_weights else estimate)

    def activations(self, part: PartName, estimate: int) -> int:
        """Return the activation memory of a part, `estimate` if the compiler did not say."""
        known = self.parts[part].activations if part in self.parts else None
        return estimate if known is None else known

    def roofline(self, part: PartName, sizes: Mapping[str, int]) -> float | None:
        """Return the seconds of one run, None for other sizes than those of the account."""
        built = self.parts.get(part)
        return built.roofline if built is not None and built.sizes == sizes else None


def read_built(folder: Path) -> Built:
    """Read an engine artifact; raises UsageError for another artifact, ArtifactError for an account without numbers."""
    manifest = read_manifest(folder)
    if manifest.kind != "engine":
        raise UsageError(f"--engine {folder}: an artifact of kind {manifest.kind!r}; `export engine` makes engines")
    try:
        return _built(folder, manifest)
    except (KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{folder}: the account of its plans is invalid ({error!r}); build it again") from None


def _built(folder: Path, manifest: Manifest) -> Built:
    options: Mapping[str, Any] = manifest.options
    plans = {part: options["plans"][part] for part in ALL_PARTS if part in options["plans"]}
    return Built(
        folder=folder.name,
        variant=manifest.variant,
        gpu=options["gpu"],
        recipe=manifest.recipe,
        holds_weights=options["weights"] in ("plan", "stream"),
        parts={part: _part(made) for part, made in plans.items()},
    )


def _part(plans: list[Mapping[str, Any]]) -> BuiltPart:
    accounts = [plan["layers"] for plan in plans]
    scratch = [told.get("scratch_of_all_profiles", told.get("scratch")) for told in accounts]
    first = accounts[0]
    return BuiltPart(
        plan_bytes=sum(plan["bytes"] for plan in plans),
        activations=None if None in scratch else max(scratch),
        roofline=first.get("roofline", {}).get("seconds"),
        sizes=first.get("sizes", {}),
    )
