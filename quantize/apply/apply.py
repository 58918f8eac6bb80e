"""The step `quantize apply`: quantize an exported artifact by a recipe, each part in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kit.artifact import Manifest, copy_texts, current, link_or_copy, verify, write_manifest
from kit.atomic_folder import building
from kit.dtypes import onnx_type
from kit.errors import UsageError
from kit.gpus import Gpu
from kit.hardware import peak_rss_bytes
from kit.ports import KV_PARTS, QUANTIZED_PARTS, PartName
from kit.recipes import Recipe
from quantize.apply.manifest import quantized_manifest
from quantize.apply.plan import check_recipe, plan
from quantize.apply.write import PartReport, write_part
from quantize.calibration.record import Record
from quantize.conversions import Progress


@dataclass(frozen=True)
class ApplyReport:
    """What a run took and gave; `up_to_date` when the artifact was there already."""

    out: Path
    recipe: str
    up_to_date: bool
    seconds: float
    parts: tuple[PartReport, ...] = field(default=())
    left_out: tuple[PartName, ...] = ()  # parts of the source that the result does not have

    def facts(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"out": str(self.out), "peak_rss_bytes": peak_rss_bytes()}


def apply(
    source: Path,
    out: Path,
    recipe: Recipe,
    record: Record | None = None,
    gpu: Gpu | None = None,
    start: Callable[[PartName, int], Progress] = lambda part, total: lambda done: None,
    done: Callable[[PartReport], None] = lambda report: None,
) -> ApplyReport:
    """Quantize the artifact at `source` by a recipe; the result stands at `out` whole or not at all.

    `start` is told of each part and the bytes that will be read, and returns what is told of progress. All layers of
    all parts are checked before anything is written. Raises UsageError for a record of other weights or a recipe that
    the artifact cannot have, ArtifactError for weights that are not finite.
    """
    begin = time.perf_counter()
    manifest = verify(source, ("onnx",))
    if out.resolve() == source.resolve():
        raise UsageError(f"--out {out} is the artifact that is to be quantized; choose another folder")
    check_recipe(manifest, recipe, record, gpu)
    if recipe.rules:  # the cache's graphs read reference images, of which no calibration knows yet
        parts = {part: found for part, found in manifest.parts.items() if part not in KV_PARTS}
        left_out = tuple(part for part in manifest.parts if part in KV_PARTS)
        manifest = replace(manifest, parts=parts)
    else:
        left_out = ()
    graphs = {part: ir.load(source / manifest.part(part).graph) for part in manifest.parts}
    plans = {
        part: plan(graphs[part], _home(source, manifest, part), part, manifest, recipe, record)
        for part in manifest.parts
        if part in QUANTIZED_PARTS
    }
    planned = quantized_manifest(source, manifest, recipe, record, plans)
    if current(out, planned):
        return ApplyReport(out, recipe.name, True, time.perf_counter() - begin)
    reports = []
    compute = onnx_type(manifest.compute)
    with building(out) as folder:
        for part in manifest.parts:
            home = _home(source, manifest, part)
            if part in plans and plans[part].changes:
                graph = folder / home.name / Path(manifest.part(part).graph).name
                reports.append(write_part(part, graphs[part], plans[part], compute, home, graph, start))
                done(reports[-1])
            else:
                for file in sorted(home.iterdir()):
                    if not (folder / home.name / file.name).exists():  # graphs of the same weights share a folder
                        link_or_copy(file, folder / home.name / file.name)
        copy_texts(source, folder)
        write_manifest(folder, planned)
    return ApplyReport(out, recipe.name, False, time.perf_counter() - begin, tuple(reports), left_out)


def _home(folder: Path, manifest: Manifest, part: PartName) -> Path:
    """Return the folder in which a part's graph and weights lie."""
    return (folder / manifest.part(part).graph).parent
