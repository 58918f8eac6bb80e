"""Say what a build takes before it starts: the planner's estimate for the plans of one artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kit.artifact import Manifest
from kit.compilers import Compiler
from kit.ports import PartName
from planner.builds import Estimate, Planned, estimate
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from runtimes.trt.build.refuse import judged_as


def estimated(
    artifact: Path, manifest: Manifest, options: EngineOptions, plans: Sequence[PlannedPlan], compiler: Compiler
) -> Estimate:
    """Estimate the build of an artifact's plans."""
    parts: dict[PartName, Planned] = {}
    for plan in plans:
        before = parts.get(plan.part, Planned(0, 0))
        parts[plan.part] = Planned(before.plans + 1, before.profiles + len(plan.profiles))
    return estimate(manifest.variant, judged_as(artifact, manifest), parts, options.weights, compiler.name)
