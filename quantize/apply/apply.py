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
from kit.gpus import Gpu
from kit.hardware import peak_rss_bytes
from kit.outputs import QUANTIZED, check_out
from kit.ports import KV_PARTS, QUANTIZED_PARTS, PartName
from kit.recipes import Recipe
from quantize.apply.manifest import quantized_manifest
from quantize.apply.plan import check_recipe, plan
from quantize.apply.write import PartReport, write_part
from quantize.calibration.record import Record
from quantize.conversions import Convert, Progress, convert


@dataclass(frozen=True)
class ApplyReport:
    """The result and cost of a run; `up_to_date` if the artifact already existed."""

    out: Path
    recipe: str
    up_to_date: bool
    seconds: float
    parts: tuple[PartReport, ...] = field(default=())
    left_out: tuple[PartName, ...] = ()  # parts of the source that are not in the result

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
    convert: Convert = convert,
) -> ApplyReport:
    """Quantize the artifact at `source` by a recipe; the result appears at `out` only when it is complete.

    `start` is called with each part and the number of bytes to read, and returns the callback for progress; `convert`
    writes the file of weights of a part. All layers
    of all parts are checked before anything is written. Raises UsageError for a record of other weights or a recipe
    that does not fit the artifact, ArtifactError for weights that are not finite.
    """
    begin = time.perf_counter()
    check_out(out, QUANTIZED, [source])
    manifest = verify(source, ("onnx",))
    check_recipe(manifest, recipe, record, gpu)
    if recipe.rules:  # the graphs of the cache read reference images, which calibration does not cover yet
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
    with building(out, QUANTIZED, [source]) as folder:
        for part in manifest.parts:
            home = _home(source, manifest, part)
            if part in plans and plans[part].changes:
                graph = folder / home.name / Path(manifest.part(part).graph).name
                reports.append(write_part(part, graphs[part], plans[part], compute, home, graph, start, convert))
                done(reports[-1])
            else:
                for file in sorted(home.iterdir()):
                    if not (folder / home.name / file.name).exists():  # graphs with the same weights share a folder
                        link_or_copy(file, folder / home.name / file.name)
        copy_texts(source, folder)
        write_manifest(folder, planned)
    return ApplyReport(out, recipe.name, False, time.perf_counter() - begin, tuple(reports), left_out)


def _home(folder: Path, manifest: Manifest, part: PartName) -> Path:
    """Return the folder with the graph and the weights of a part."""
    return (folder / manifest.part(part).graph).parent
