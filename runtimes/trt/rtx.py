"""What TensorRT for RTX needs when a plan runs: compiled kernels that outlive the process, and its own CUDA graphs.

Its plans hold no machine code for the GPU: kernels are compiled when a shape is first used. The runtime cache holds
them, and lies beside the plan. The library rejects a cache of another GPU, driver or release by itself; the file name
depends on these too, so that machines that share a folder do not replace each other's files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import tensorrt as trt

from kit.atomic_file import write_file
from kit.cuda_device import CudaDevice
from kit.errors import ArtifactError
from runtimes.trt.record import KERNELS

logger = logging.getLogger(__name__)
rtx: Any = trt  # names that the type stubs, which are of TensorRT itself, do not have
MOST_BYTES = 100_000_000  # NVIDIA's documentation: a larger cache takes long to load
KEPT = 4  # files beside one plan: other GPUs, other drivers, plans that were built again
ENDS = 2**20  # bytes at each end of a plan that its fingerprint reads


def require_valid(runtime: Any, mapped: Any, path: Path, log: object) -> None:
    """Raise ArtifactError with the library's reasons if it says that a plan does not run here."""
    validity, reasons = runtime.get_engine_validity(mapped)
    if validity == rtx.EngineValidity.INVALID:
        words = [name for name, reason in rtx.EngineInvalidityDiagnostics.__members__.items() if int(reason) & reasons]
        raise ArtifactError(f"{path}: TensorRT for RTX cannot run the plan: {', '.join(words) or log}")


def cache_file(plan: Path, device: CudaDevice) -> Path:
    """Return where the kernels of a plan are kept for a GPU, its driver, this TensorRT for RTX and this plan."""
    key = [device.title, device.capability, device.driver, trt.__version__, _fingerprint(plan)]
    return plan.with_name(f"{plan.stem}.{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}{KERNELS}")


def _fingerprint(plan: Path) -> str:
    """Return a digest of the size and both ends of a plan; a plan of gigabytes is not read for it."""
    size = plan.stat().st_size
    with plan.open("rb") as stream:
        ends = [stream.read(ENDS)]
        stream.seek(max(0, size - ENDS))
        ends.append(stream.read(ENDS))
    return hashlib.sha256(b"".join([str(size).encode(), *ends])).hexdigest()


class RtxConfig:
    """How contexts of one plan run; they share compiled kernels."""

    def __init__(self, engine: Any, file: Path, graphs: bool) -> None:
        """Load the kernels of earlier processes; a file that does not fit is left out, which costs compiling again."""
        self._config = engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = rtx.CudaGraphStrategy
        self._config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
        self._cache = self._config.create_runtime_cache()
        self._file = file
        self._saved = b""  # digest of what was read or written last
        self._calls = 0
        self._load()
        if not self._config.set_runtime_cache(self._cache):
            logger.warning("TensorRT for RTX does not take a runtime cache; kernels are compiled in every process")

    def create_context(self, engine: Any) -> Any:
        """Create a context that runs as configured; None if the library cannot."""
        return engine.create_execution_context(self._config)

    def count_call(self) -> None:
        """Count a call; after the first, second, fourth and so on, kernels that were compiled since are written.

        Kernels for a shape are compiled in the background while others run, so they are not all there after one call.
        """
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            self.save()

    def save(self) -> None:
        """Write the kernels in one step, so that no process reads half of a file; a folder may be read-only."""
        content = bytes(self._cache.serialize())
        found = hashlib.sha256(content).digest()
        if not content or found == self._saved:
            return
        self._saved = found
        if len(content) > MOST_BYTES:
            logger.warning("%s: %d bytes of kernels are too many to keep", self._file, len(content))
            return
        try:
            write_file(self._file, content)
            _leave_newest(self._file)
        except OSError as error:
            logger.warning("%s: kernels cannot be kept (%s), so the next process compiles again", self._file, error)

    def _load(self) -> None:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("%s: cannot be read (%s); kernels are compiled again", self._file, error.strerror)
            return
        if len(content) <= MOST_BYTES and self._cache.deserialize(content):
            self._saved = hashlib.sha256(content).digest()
        else:
            logger.warning("%s: is not for this machine or is broken; kernels are compiled again", self._file)


def _leave_newest(file: Path) -> None:
    """Remove the oldest files of a plan beyond `KEPT`."""
    plan = file.name.split(".")[0]
    found = sorted(file.parent.glob(f"{plan}.*{KERNELS}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in found[KEPT:]:
        old.unlink(missing_ok=True)
