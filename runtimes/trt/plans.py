"""Load plans into execution contexts: deserialized from mapped files, and refitted if they contain no weights.

Contexts own no activation memory (USER_MANAGED): text encoder, transformer and VAE never run at the same time, so they
share one arena. Each profile has its own context, because switching the profile of a context costs a synchronization.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorrt as trt

from kit.cuda_device import CudaDevice
from kit.errors import ArtifactError
from kit.ports import PartName
from runtimes.trt.bound_weights import BoundWeights
from runtimes.trt.cuda import Device
from runtimes.trt.external_weights import ExternalWeights, complaints
from runtimes.trt.log import Log
from runtimes.trt.profiles import Profile
from runtimes.trt.record import EngineRecord, PlanRecord
from runtimes.trt.rtx import RtxConfig, cache_file, require_valid

ALIGNMENT = 256  # bytes; TensorRT requires it for activation memory


class Arena:
    """One block of activation memory for engines that run one after another: reserve for each, then allocate once."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._block: Any = None
        self.nbytes = 0

    def reserve(self, nbytes: int) -> None:
        """Reserve memory before the allocation: captured graphs contain addresses, so the block cannot move."""
        if self._block is not None:
            raise AssertionError("the arena is allocated already")
        self.nbytes = max(self.nbytes, nbytes)

    def allocate(self) -> None:
        """Allocate the block; nothing can be reserved afterwards."""
        if self._block is None:
            self._block = self._device.empty((self.nbytes + ALIGNMENT,), "u8")

    @property
    def address(self) -> int:
        """The aligned start of the block, which is allocated on first use."""
        self.allocate()
        start = int(self._block.data_ptr())
        return start + -start % ALIGNMENT


@dataclass
class Context:
    """An execution context for one profile of one plan."""

    profile: Profile
    context: trt.IExecutionContext
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the input shapes that were set last
    rtx: RtxConfig | None = None  # of its plan, if TensorRT for RTX built it


@dataclass(frozen=True)
class Loaded:
    """A plan: its record in the manifest, and its TensorRT engine."""

    record: PlanRecord
    engine: trt.ICudaEngine
    rtx: RtxConfig | None = None


class Plans:
    """All plans of one part on one device."""

    def __init__(
        self,
        root: Path,
        part: PartName,
        record: EngineRecord,
        device: Device,
        arena: Arena,
        here: CudaDevice | None = None,
        graphs: bool = True,
    ) -> None:
        """Load every plan and reserve its activation memory.

        `here` is the GPU as its driver describes it; `graphs` is whether TensorRT for RTX records CUDA graphs. Raises
        ArtifactError if TensorRT rejects a plan or its weights.
        """
        self.log = Log()
        self._compiler = record.compiler
        self._runtime = trt.Runtime(self.log)
        if record.version == "compatible":
            self._runtime.engine_host_code_allowed = True  # such a plan contains its own runtime
        self._device = device
        self._arena = arena
        self._loaded: list[Loaded] = []
        self._maps: list[mmap.mmap] = []
        self.weights: BoundWeights | None = None
        if record.weights == "inputs":  # one copy for all plans of the part
            self.weights = BoundWeights(device, root / record.plans_of(part)[0].file)
        for plan in record.plans_of(part):
            engine = self._deserialize(root / plan.file)
            if record.weights == "refit":
                refit(engine, root / part / "model.onnx", self.log)
            config = None
            if record.compiler == "tensorrt-rtx":
                config = RtxConfig(engine, cache_file(root / plan.file, here or record.device), graphs)
            self._loaded.append(Loaded(plan, engine, config))
            for index in range(engine.num_optimization_profiles):
                arena.reserve(engine.get_device_memory_size_for_profile_v2(index))

    @property
    def streamable(self) -> int:
        """The number of bytes of weights of all plans that can be streamed."""
        return sum(loaded.engine.streamable_weights_size for loaded in self._loaded)

    def share_budget(self, total: int) -> None:
        """Give streamed weights a share of the free GPU memory, in proportion to `total` streamable bytes.

        TensorRT's automatic budget assumes a single engine. The budget cannot change once contexts exist.
        """
        for loaded in self._loaded:
            engine = loaded.engine
            size, automatic = engine.streamable_weights_size, engine.get_weight_streaming_automatic_budget()
            engine.weight_streaming_budget_v2 = min(size, automatic * size // max(1, total))

    def contexts(self) -> Sequence[Context]:
        """Create a context for each profile, in the order of the record, with the memory of the arena."""
        made = []
        for loaded in self._loaded:
            plan, engine = loaded.record, loaded.engine
            if engine.num_optimization_profiles != len(plan.profiles):
                raise ArtifactError(
                    f"{plan.file}: has {engine.num_optimization_profiles} profiles, "
                    f"the manifest has {len(plan.profiles)}"
                )
            for index, profile in enumerate(plan.profiles):
                context = _create(loaded)
                if context is None:
                    raise ArtifactError(f"{plan.file}: cannot create an execution context: {self.log}")
                if not context.set_optimization_profile_async(index, self._device.stream):
                    raise ArtifactError(f"{plan.file}: profile {profile} cannot be set: {self.log}")
                context.set_device_memory(self._arena.address, self._arena.nbytes)
                for name, address in self.weights.addresses() if self.weights is not None else ():
                    if not context.set_tensor_address(name, address):
                        raise ArtifactError(f"{plan.file}: TensorRT rejects the weight {name}: {self.log}")
                made.append(Context(profile, context, rtx=loaded.rtx))
        return made

    def _deserialize(self, path: Path) -> trt.ICudaEngine:
        if not path.is_file() or not path.stat().st_size:
            raise ArtifactError(f"{path}: missing or empty; build the engine again")
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(mapped)
        log = self.log
        if self._compiler == "tensorrt-rtx":
            require_valid(self._runtime, mapped, path, log)
        engine = self._runtime.deserialize_cuda_engine(mapped)
        if engine is None:
            raise ArtifactError(f"{path}: TensorRT cannot load the plan: {log}")
        return engine


def _create(loaded: Loaded) -> Any:
    """Create a context without memory of its own; None if TensorRT cannot."""
    engine = loaded.engine
    if loaded.rtx is not None:
        return loaded.rtx.create_context(engine)
    return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def refit(engine: trt.ICudaEngine, graph: Path, log: Log) -> None:
    """Give a plan the weights of a graph by address; raises ArtifactError, which lists missing weights."""
    weights = ExternalWeights(graph)
    refitter = trt.Refitter(engine, log)
    reader = trt.OnnxParserRefitter(refitter, log)
    weights.feed(reader)
    if not reader.refit_model_proto():
        raise ArtifactError(f"{graph}: does not fit the plan: {complaints(reader)}")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights()[:5])
        raise ArtifactError(f"{graph}: the plan still lacks weights ({missing or log})")
