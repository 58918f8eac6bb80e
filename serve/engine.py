"""How a part is run: the protocol that every runtime fulfils, and the ONNX Runtime one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kit.errors import ArtifactError, Flux2Error
from kit.ports import Ports

Array = npt.NDArray[np.generic]


class EngineError(Flux2Error):
    """A runtime failed while it ran a part: out of memory, or inputs it cannot take."""


class Engine(Protocol):
    """Runs one exported part: arrays by port name in, arrays by port name out."""

    ports: Ports

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; every array has the batch as its first axis."""
        ...


# An arena keeps more than the widest moment needs: with it klein-4b in int8 took 13.2 GB for a picture of 512x512,
# without it 9.5 GB in the same time. A small model is 5 % faster with it.
ARENA_BYTES = 64 * 2**20  # of weights, from which on there is none


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def session_options(threads: int = 0) -> Any:
    """Return the options of every ONNX Runtime session of the kit; 0 threads are one for each core."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


class OrtEngine:
    """An exported graph in ONNX Runtime.

    Spinning is off, so that a stage that waits leaves the cores to the stage that works.
    """

    def __init__(self, graph: Path, ports: Ports, threads: int = 0, provider: str = "CPUExecutionProvider") -> None:
        import onnxruntime as ort

        options = session_options(threads)
        options.enable_cpu_mem_arena = _weight_bytes(graph.parent) < ARENA_BYTES
        if provider not in ort.get_available_providers():
            raise ArtifactError(
                f"ONNX Runtime has no {provider} here; it has: {', '.join(ort.get_available_providers())}"
            )
        try:
            self.session = ort.InferenceSession(str(graph), options, providers=[provider])
        except Exception as error:  # onnxruntime raises a dozen types of its own for a bad model
            raise ArtifactError(f"{graph}: ONNX Runtime cannot load it: {error}") from error
        self.ports = ports
        self._outputs = [port.name for port in ports.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self.session.run(self._outputs, dict(inputs))
        except Exception as error:  # onnxruntime's own error types share no base but Exception
            raise EngineError(str(error)) from error
        return dict(zip(self._outputs, results, strict=True))
