"""Open the engines of an artifact: graphs in ONNX Runtime or OpenVINO, plans in TensorRT, or packages in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kit.artifact import Manifest
from kit.compilers import COMPILERS, activate
from kit.engine import Engine
from kit.errors import UsageError
from kit.graph_runtimes import DEFAULT_RUNTIME, GraphRuntime
from kit.ports import PartName, Ports
from runtimes.openvino.engine import OpenVinoEngine
from runtimes.ort.engine import OrtEngine
from runtimes.trt.record import EngineRecord

OPEN_GRAPH: Mapping[GraphRuntime, Callable[[Path, Ports, int], Engine]] = {  # graph, ports, threads
    "ort-cpu": OrtEngine,
    "openvino-fp32": lambda graph, ports, threads: OpenVinoEngine(graph, ports, threads, "fp32"),
    "openvino-bf16": lambda graph, ports, threads: OpenVinoEngine(graph, ports, threads, "bf16"),
}


def open_parts(
    folder: Path,
    manifest: Manifest,
    parts: Sequence[PartName],
    threads: int = 0,
    runtime: GraphRuntime = DEFAULT_RUNTIME,
) -> Mapping[PartName, Engine]:
    """Open parts of an artifact or of a deployment; the engines of an engine artifact share activation memory.

    Plans and packages have a runtime of their own: for any `runtime` but the default they raise UsageError.
    """
    if runtime != DEFAULT_RUNTIME and manifest.kind in ("engine", "aoti"):
        raise UsageError(f"{folder} is of kind {manifest.kind}, which {runtime} cannot run; give an ONNX artifact")
    records = {part: manifest.part(part) for part in parts}
    if manifest.kind == "engine":
        return open_plans(folder, EngineRecord.of(manifest), {part: records[part].ports for part in parts})
    if manifest.kind == "aoti":
        from runtimes.aoti.engine import open_engine  # imports torch, which ONNX Runtime does not need

        return {part: open_engine(folder, part) for part in parts}
    open_graph = OPEN_GRAPH[runtime]
    return {part: open_graph(folder / record.graph, record.ports, threads) for part, record in records.items()}


def open_plans(root: Path, record: EngineRecord, ports: Mapping[PartName, Ports]) -> Mapping[PartName, Engine]:
    """Open parts of an engine artifact with the TensorRT that built it; a process can load only one of the two."""
    activate(COMPILERS[record.compiler])
    from runtimes.trt.engine import open_engines

    return open_engines(root, record, ports)
