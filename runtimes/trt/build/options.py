"""The options of an engine build and the plans that follow from them; pure data, without heavy imports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kit.artifact import Manifest
from kit.compilers import CompilerName, Hardware, Version, WeightMode
from kit.errors import UsageError
from kit.ports import PartName
from runtimes.trt.profiles import Profile, Sizing, derive, stated

Engines = Literal["one", "per-profile"]


@dataclass(frozen=True)
class EngineOptions:
    """How to build; the defaults of the command line."""

    gpu: str
    parts: tuple[PartName, ...] = ()  # empty: all parts of the artifact
    sizing: Sizing = field(default_factory=Sizing)
    stated: Mapping[PartName, tuple[str, ...]] = field(default_factory=dict)  # replaces the derived profiles
    compiler: CompilerName | Literal["auto"] = "auto"
    engines: Engines = "one"  # all profiles in one plan, or one plan per profile
    weights: WeightMode = "plan"
    hardware: Hardware = "exact"
    version: Version = "exact"
    level: int = 3  # builder optimization level, 0 (fast build) to 5
    workspace: int | None = None  # bytes; None: all free memory

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise UsageError(f"--level {self.level}: must be between 0 and 5")
        if self.workspace is not None and self.workspace <= 0:
            raise UsageError(f"--workspace {self.workspace}: must be more than 0")


@dataclass(frozen=True)
class PlannedPlan:
    """One plan to build."""

    part: PartName
    file: str  # relative to the engine artifact
    profiles: tuple[Profile, ...]


def planned(manifest: Manifest, options: EngineOptions) -> tuple[PlannedPlan, ...]:
    """List the plans to build from an artifact, in the order of the pipeline."""
    for part in (*options.parts, *options.stated):
        manifest.part(part)  # raises ArtifactError if the artifact does not have it
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
    """Return the default folder of kernel timings."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flux2-deploy" / "tensorrt"
