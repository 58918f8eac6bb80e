"""Run an exported graph in OpenVINO's CPU plugin as an engine.

OpenVINO reads the same ONNX files as ONNX Runtime. Its compute type is an option of the runtime, not of the artifact:
with bf16 it rounds what the graph keeps in fp32, which the matrix units of some CPUs (AMX, AVX512-BF16) multiply
faster. Images are therefore not those of fp32, and `quantize gate --runtime openvino-bf16` judges them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from kit.engine import Array
from kit.errors import ArtifactError, EngineError, UsageError
from kit.ports import Ports
from runtimes.input_sizes import input_sizes

ComputeType = Literal["fp32", "bf16"]
PRECISIONS: Mapping[ComputeType, str] = {"fp32": "f32", "bf16": "bf16"}  # by OpenVINO's names


def load() -> Any:
    """Import OpenVINO without its telemetry; raises UsageError, which says what to install."""
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))  # its import fails, and a stub takes its place
    try:
        import openvino
    except ImportError as error:
        raise UsageError(f"OpenVINO is not installed ({error}): pip install 'flux2-deploy[openvino]'") from None
    return openvino


class OpenVinoEngine:
    """A graph with fp32 ports in OpenVINO; 0 threads means one per core."""

    def __init__(self, graph: Path, ports: Ports, threads: int = 0, compute: ComputeType = "fp32") -> None:
        """Compile; raises UsageError without OpenVINO or bf16 on this CPU, and ArtifactError if the graph fails."""
        openvino = load()
        core = openvino.Core()
        if compute == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError("OpenVINO has no bf16 on this CPU; use the runtime openvino-fp32")
        half = next((port for port in (*ports.inputs, *ports.outputs) if port.dtype == "bf16"), None)
        if half is not None:
            raise ArtifactError(f"{graph}: port {half.name} is bf16; export with --dtype fp32 for OpenVINO on a CPU")
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISIONS[compute],
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            self._request = core.compile_model(graph, "CPU", options).create_infer_request()
        except Exception as error:  # openvino raises RuntimeError and its own types for an invalid model
            raise ArtifactError(f"{graph}: OpenVINO cannot load it: {error}") from error
        self.ports = ports

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        input_sizes(self.ports, inputs)  # OpenVINO would convert an input, or use its previous value, in silence
        try:
            results = self._request.infer(dict(inputs), share_inputs=True)
        except Exception as error:  # openvino's error types have no common base but Exception
            raise EngineError(str(error)) from error
        return {port.name: np.array(results[port.name]) for port in self.ports.outputs}
