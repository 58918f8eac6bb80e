"""Open ONNX Runtime sessions, and run them as engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.engine import Array
from kit.errors import ArtifactError, EngineError
from kit.hardware import cpu
from kit.ports import Ports

CPU = "CPUExecutionProvider"
FOLDER = "session.model_external_initializers_file_folder_path"  # folder of the weights, for a model passed as bytes
LARGE = 64 * 2**20  # bytes of weights; larger parts run without memory pattern and in panels
PANEL_COLUMNS = 1024  # 19 MB of sums for the 4,608 rows of a one-megapixel image


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def session_options(threads: int = 0) -> Any:
    """Return the options of every ONNX Runtime session; 0 threads means one per core."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def open_session(graph: Path, options: Any, provider: str = CPU, panels: bool = True) -> Any:
    """Open a graph; without `panels`, wide int8 products are not split (see runtimes.ort.panels).

    Memory patterns are disabled for large parts, because they hold the peak memory of the first run twice. Raises
    ArtifactError, which names the graph.
    """
    import onnxruntime as ort

    model: str | bytes = str(graph)
    if _weight_bytes(graph.parent) >= LARGE:
        options.enable_mem_pattern = False
        if panels and provider == CPU and cpu().int8:
            from runtimes.ort.panels import in_panels  # imports onnx_ir, which small parts and GPUs do not need

            model = in_panels(graph, PANEL_COLUMNS) or model
            options.add_session_config_entry(FOLDER, str(graph.parent))
    try:
        return ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # onnxruntime raises a dozen error types for an invalid model
        raise ArtifactError(f"{graph}: ONNX Runtime cannot load it: {error}") from error


class OrtEngine:
    """An exported graph in ONNX Runtime.

    Spinning is disabled, so that waiting threads leave the cores to other stages. A small graph on a CPU is open twice,
    so that the rows of a call can run side by side.
    """

    def __init__(self, graph: Path, ports: Ports, threads: int = 0, provider: str = CPU, panels: bool = True) -> None:
        import onnxruntime as ort

        if provider not in ort.get_available_providers():
            raise ArtifactError(
                f"ONNX Runtime has no {provider} here; it has: {', '.join(ort.get_available_providers())}"
            )
        self.session = open_session(graph, session_options(threads), provider, panels)
        self.ports = ports
        self._run = self.session.run
        cores = threads or cpu().cores
        if provider == CPU and cores > 1 and _weight_bytes(graph.parent) < LARGE:
            from runtimes.ort.rows import SideBySide

            self._run = SideBySide(self.session, open_session(graph, session_options(1)), cores).run
        self._outputs = [port.name for port in ports.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self._run(self._outputs, dict(inputs))
        except Exception as error:  # onnxruntime's error types have no common base but Exception
            raise EngineError(str(error)) from error
        return dict(zip(self._outputs, results, strict=True))
