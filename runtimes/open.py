"""Open the engines of an artifact: graphs in ONNX Runtime or OpenVINO, plans in TensorRT, or packages in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kit.artifact import Manifest
from kit.engine import Engine
from kit.errors import UsageError
from kit.graph_runtimes import DEFAULT_RUNTIME, GraphRuntime
from kit.ports import PartName, Ports
from runtimes.openvino.engine import OpenVinoEngine
from runtimes.ort.engine import OrtEngine
from runtimes.trt.record import EngineRecord

OPEN_GRAPH: Mapping[GraphRuntime, Callable[[Path, Ports, int], Engine]] = {  # graph, ports, threads
    "ort": OrtEngine,
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
        from runtimes.trt.engine import open_engines

        return open_engines(folder, EngineRecord.of(manifest), {part: records[part].ports for part in parts})
    if manifest.kind == "aoti":
        from runtimes.aoti.engine import AotiEngine  # imports torch, which ONNX Runtime does not need

        on_gpu = str(manifest.options["device"]).startswith("cuda")
        return {part: AotiEngine(folder, part, "graphs" if on_gpu else "calls") for part in parts}
    open_graph = OPEN_GRAPH[runtime]
    return {part: open_graph(folder / record.graph, record.ports, threads) for part, record in records.items()}
