"""What can be chosen when engines are built, and which plans that makes: data, before anything is imported or run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kit.artifact import Manifest
from kit.errors import UsageError
from kit.ports import PartName
from runtimes.trt.profiles import Profile, Sizing, derive, stated
from runtimes.trt.record import Hardware, Version, WeightMode

Engines = Literal["one", "per-profile"]


@dataclass(frozen=True)
class EngineOptions:
    """How to build; the command line reads its defaults here."""

    gpu: str
    parts: tuple[PartName, ...] = ()  # none: all that the artifact has
    sizing: Sizing = field(default_factory=Sizing)
    stated: Mapping[PartName, tuple[str, ...]] = field(default_factory=dict)  # in place of the derived profiles
    engines: Engines = "one"  # several profiles share one plan and its weights, or each has its own
    weights: WeightMode = "plan"
    hardware: Hardware = "exact"
    version: Version = "exact"
    level: int = 3  # builder optimization level, 0 (quick build) to 5
    workspace: int | None = None  # bytes; None: all that is free

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise UsageError(f"--level {self.level}: must be between 0 and 5")
        if self.workspace is not None and self.workspace <= 0:
            raise UsageError(f"--workspace {self.workspace}: must be more than 0")


@dataclass(frozen=True)
class PlannedPlan:
    """One plan to build."""

    part: PartName
    file: str  # in the engine artifact
    profiles: tuple[Profile, ...]


def planned(manifest: Manifest, options: EngineOptions) -> tuple[PlannedPlan, ...]:
    """List the plans that the options make of an artifact, in the order of the pipeline."""
    for part in (*options.parts, *options.stated):
        manifest.part(part)  # raises what it has instead
    plans: list[PlannedPlan] = []
    for part, record in manifest.parts.items():
        if options.parts and part not in options.parts:
            continue
        texts = options.stated.get(part, ())
        profiles = tuple(stated(part, text, record.ports, f"stated-{i}") for i, text in enumerate(texts, 1))
        profiles = profiles or derive(record.ports, options.sizing)
        if options.engines == "one" or len(profiles) == 1:
            plans.append(PlannedPlan(part, f"{part}/model.plan", profiles))
        else:
            plans += [PlannedPlan(part, f"{part}/{profile.name}.plan", (profile,)) for profile in profiles]
    return tuple(plans)


def default_timing_cache() -> Path:
    """Return the folder in which timings are kept between builds."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flux2-deploy" / "tensorrt"
