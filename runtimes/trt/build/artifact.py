"""Build an engine artifact from an ONNX artifact: reject what cannot be built, build the plans, write the manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit.artifact import (
    MANIFEST,
    Manifest,
    PartRecord,
    copy_texts,
    digest,
    link_or_copy,
    step_versions,
    verified_or_none,
    verify,
    write_manifest,
)
from kit.atomic_folder import building
from kit.compilers import AUTO, COMPILERS, Compiler, choose, installed
from kit.cuda_device import CudaDevice, Machine, this_machine
from kit.errors import ArtifactError, UsageError
from kit.gpus import gpu
from kit.outputs import ENGINE, check_out
from kit.ports import PartName
from runtimes.trt.build.options import EngineOptions, PlannedPlan, planned
from runtimes.trt.build.refuse import compiler_refusal, judged_as, machine_refusal, refusal
from runtimes.trt.record import EngineRecord, PlanRecord

REVISION = 2  # raise when the same artifact and options give other plans on the same machine
GRAPH = "model.onnx"  # the graph of a part whose plan contains no weights
Build = Callable[[Sequence[tuple[PlannedPlan, Path]]], Sequence[PlanRecord]]  # plans and the files to write


@dataclass(frozen=True)
class BuildRequest:
    """A build that passed every check."""

    artifact: Path
    manifest: Manifest
    options: EngineOptions
    plans: tuple[PlannedPlan, ...]
    compiler: Compiler = COMPILERS["tensorrt"]


def check(artifact: Path, options: EngineOptions, out: Path) -> BuildRequest:
    """Check artifact and options without TensorRT or a GPU; raises UsageError with the nearest setting that works."""
    check_out(out, ENGINE, [artifact])
    manifest = verify(artifact, kinds=("onnx", "quantized"))
    plans = planned(manifest, options)
    row = choose(options.compiler, gpu(options.gpu), this_machine().device_name)
    if (why := compiler_refusal(options, row)) and options.compiler != AUTO:
        raise UsageError(why)
    if why:  # what no other compiler can do is left to TensorRT
        row = COMPILERS["tensorrt"]
    if why := refusal(manifest, judged_as(artifact, manifest), options, plans, _free(out)):
        raise UsageError(why)
    return BuildRequest(artifact, manifest, options, plans, row)


def check_machine(request: BuildRequest) -> Machine:
    """Return this machine; raises UsageError if it cannot build the request."""
    machine = this_machine()
    if why := machine_refusal(request.manifest, request.options, machine, request.compiler):
        raise UsageError(why)
    if request.compiler.targets:  # ahead of time: the GPU is the one that the plans are for
        card = gpu(request.options.gpu)
        device = CudaDevice(card.title, card.compute_capability, card.memory_bytes, driver="")
        return Machine(device, installed(request.compiler))
    return machine


def write_engine(request: BuildRequest, machine: Machine, out: Path, build: Build) -> tuple[Manifest, float]:
    """Build every plan and write the artifact; returns its manifest and the seconds it took.

    An artifact at `out` that was built from the same source with the same options, GPU, driver and TensorRT is kept. An
    interrupted build leaves only its timings.
    """
    begin = time.perf_counter()
    if (found := _current(request, machine, out)) is not None:
        return found, 0.0
    with building(out, ENGINE, [request.artifact]) as folder:
        targets = [(plan, folder / plan.file) for plan in request.plans]
        for _, target in targets:
            target.parent.mkdir(exist_ok=True)
        made: dict[PartName, list[PlanRecord]] = {}
        for plan, record in zip(request.plans, build(targets), strict=True):
            made.setdefault(plan.part, []).append(record)
        for part in made:
            if request.options.weights in ("refit", "inputs"):
                graph = request.artifact / request.manifest.part(part).graph
                _add_weights(graph, folder / part, with_graph=request.options.weights == "refit")
        copy_texts(request.artifact, folder)
        manifest = write_manifest(folder, _manifest(request, machine, made))
    return manifest, time.perf_counter() - begin


def _manifest(request: BuildRequest, machine: Machine, made: Mapping[PartName, list[PlanRecord]]) -> Manifest:
    source = request.manifest
    assert machine.device is not None
    assert machine.tensorrt is not None
    options = request.options
    record = EngineRecord(
        gpu=options.gpu,
        device=machine.device,
        tensorrt=machine.tensorrt,
        weights=options.weights,
        hardware=options.hardware,
        version=options.version,
        build=_chosen(options),
        plans={part: tuple(plans) for part, plans in made.items()},
        compiler=request.compiler.name,
    )
    return Manifest(
        kind="engine",
        variant=source.variant,
        compute=source.compute,
        recipe=source.recipe,
        options=record.options(),
        source=_source(request),
        parts={part: PartRecord(plans[0].file, source.part(part).ports) for part, plans in made.items()},
        versions=step_versions("engine", REVISION, *request.compiler.packages),
    )


def _chosen(options: EngineOptions) -> dict[str, Any]:
    names = ("sizing", "stated", "engines", "level", "workspace")
    return {name: value for name, value in asdict(options).items() if name in names}


def _source(request: BuildRequest) -> dict[str, Any]:
    return {
        "artifact": request.artifact.name,
        "kind": request.manifest.kind,
        "manifest": digest(request.artifact / MANIFEST),
    }


def _current(request: BuildRequest, machine: Machine, out: Path) -> Manifest | None:
    """Return the manifest of the artifact at `out` if the build would only repeat it."""
    found = verified_or_none(out, ("engine",))
    try:
        record = None if found is None else EngineRecord.of(found)
    except ArtifactError:
        record = None
    if found is None or record is None:
        return None
    options = request.options
    same = (
        found.source == _source(request)
        and found.versions.get("engine revision") == str(REVISION)
        and record.compiler == request.compiler.name
        and (record.device, record.tensorrt) == (machine.device, machine.tensorrt)
        and (record.weights, record.hardware, record.version) == (options.weights, options.hardware, options.version)
        and dict(record.build) == _listed(_chosen(options))
        and set(record.plans) == {plan.part for plan in request.plans}
    )
    return found if same else None


def _listed(value: Any) -> Any:
    """Convert tuples to lists, as JSON does."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _add_weights(graph: Path, folder: Path, with_graph: bool) -> None:
    """Link the weight files of a graph, and the graph for refitting, next to plans that contain no weights."""
    if with_graph:
        link_or_copy(graph, folder / GRAPH)
    for file in sorted(graph.parent.glob("*.safetensors")):
        if not (folder / file.name).exists():  # graphs with the same weights share a folder
            link_or_copy(file, folder / file.name)


def _free(out: Path) -> int | None:
    """Return the free bytes of the disk of `out`; None if no folder of the path exists."""
    place = next((folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir()), None)
    return shutil.disk_usage(place).free if place else None
