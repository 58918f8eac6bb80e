"""Parts in ONNX Runtime: how its sessions are opened, and the engine around one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.engine import Array
from kit.errors import ArtifactError, EngineError
from kit.hardware import cpu
from kit.ports import Ports

CPU = "CPUExecutionProvider"
FOLDER = "session.model_external_initializers_file_folder_path"  # of weights, for a model that comes as bytes


LARGE = 64 * 2**20  # bytes of weights from which on a part is treated as below
PANEL_COLUMNS = 1024  # the 4,608 rows of a megapixel image then have 19 MB of sums


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


def open_session(graph: Path, options: Any, provider: str = CPU, panels: bool = True) -> Any:
    """Open a graph as the kit runs it; without `panels`, wide int8 products stay whole (see runtimes.ort.panels).

    A large part has no memory pattern, which holds the peak of a first run a second time. Raises ArtifactError that
    names the graph.
    """
    import onnxruntime as ort

    model: str | bytes = str(graph)
    if _weight_bytes(graph.parent) >= LARGE:
        options.enable_mem_pattern = False
        if panels and provider == CPU and cpu().int8:
            from runtimes.ort.panels import in_panels  # brings onnx_ir, which small parts and GPUs do without

            model = in_panels(graph, PANEL_COLUMNS) or model
            options.add_session_config_entry(FOLDER, str(graph.parent))
    try:
        return ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # onnxruntime raises a dozen types of its own for a bad model
        raise ArtifactError(f"{graph}: ONNX Runtime cannot load it: {error}") from error


class OrtEngine:
    """An exported graph in ONNX Runtime.

    Spinning is off, so that a stage that waits leaves the cores to the stage that works.
    """

    def __init__(self, graph: Path, ports: Ports, threads: int = 0, provider: str = CPU, panels: bool = True) -> None:
        import onnxruntime as ort

        if provider not in ort.get_available_providers():
            raise ArtifactError(
                f"ONNX Runtime has no {provider} here; it has: {', '.join(ort.get_available_providers())}"
            )
        self.session = open_session(graph, session_options(threads), provider, panels)
        self.ports = ports
        self._outputs = [port.name for port in ports.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self.session.run(self._outputs, dict(inputs))
        except Exception as error:  # onnxruntime's own error types share no base but Exception
            raise EngineError(str(error)) from error
        return dict(zip(self._outputs, results, strict=True))
