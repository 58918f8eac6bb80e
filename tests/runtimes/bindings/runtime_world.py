"""A TensorRT that computes y = 2 x + sum(ids) on the CPU, by the addresses that it is handed; and a device to match."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from kit.cuda_device import CudaDevice, Machine
from kit.dtypes import Dtype, to_array, to_tensor
from kit.engine import Array
from kit.ports import Port, Ports
from runtimes.trt.profiles import AxisRange, Profile
from runtimes.trt.record import EngineRecord, PlanRecord
from tests.runtimes.bindings.real import RTX
from tests.runtimes.bindings.strict import StrictModule

PORTS = Ports(
    inputs=(Port("x", "bf16", ("batch", "image_tokens", 2)), Port("ids", "i64", ("batch", "image_tokens", 4))),
    outputs=(Port("y", "bf16", ("batch", "image_tokens", 2)),),
)
SMALL = Profile("small", {"batch": AxisRange(1, 1, 4), "image_tokens": AxisRange(1, 8, 8)})
LARGE = Profile("large", {"batch": AxisRange(1, 1, 2), "image_tokens": AxisRange(9, 32, 32)})
NEEDS = {"small": 1000, "large": 5000}  # bytes of activations
STREAMABLE = {"small": 10_000, "large": 20_000}  # bytes of weights
DEVICE = CudaDevice("NVIDIA L4", (8, 9), 23034 * 2**20, "580.65.06")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64, "u8": torch.uint8}


class CpuDevice:
    """Memory on the CPU; what is captured is recorded and not run, as in CUDA."""

    stream = 77

    def __init__(self) -> None:
        self.recording: list[Callable[[], None]] | None = None
        self.captures = 0
        self.replays = 0
        self.uploads: list[tuple[int, ...]] = []

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        return torch.zeros(shape, dtype=TYPES[dtype])

    def upload(self, target: Any, array: Array) -> None:
        self.uploads.append(array.shape)
        target.copy_(to_tensor(array))

    def upload_transposed(self, target: Any, array: Array) -> None:
        staged = to_tensor(array)
        target.view(staged.dtype).view(staged.shape[::-1]).copy_(staged.t())

    def download(self, source: Any) -> Array:
        return to_array(source.clone())

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        recorded: list[Callable[[], None]] = []
        self.recording = recorded
        work()
        self.recording = None
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for step in recorded:
                step()

        return replay


class RuntimeWorld:
    """Gives the stand-in engines of the profiles in a record, and contexts that compute."""

    def __init__(self, trt: StrictModule, record: EngineRecord, device: CpuDevice) -> None:
        self.trt, self.device = trt, device
        self.profiles = {plan.file: plan.profiles for plans in record.plans.values() for plan in plans}
        self.engine_of: dict[int, tuple[Profile, ...]] = {}
        self.loaded: list[bytes] = []
        self.state: dict[int, dict[str, Any]] = {}
        self.alive: list[Any] = []
        trt.behave(
            "Runtime", "deserialize_cuda_engine", lambda runtime, serialized_engine: self.load(serialized_engine)
        )
        engine = "ICudaEngine"
        trt.behave(engine, "num_optimization_profiles", lambda e: len(self.engine_of[id(e)]))
        trt.behave(
            engine,
            "get_device_memory_size_for_profile_v2",
            lambda e, profile_index: NEEDS[self.engine_of[id(e)][profile_index].name],
        )
        trt.behave(engine, "create_execution_context", self.create_context)
        trt.behave(engine, "get_weight_streaming_automatic_budget", lambda e: 12000)
        trt.behave(engine, "streamable_weights_size", lambda e: STREAMABLE[self.engine_of[id(e)][0].name])
        context = "IExecutionContext"
        for method, remember in (
            ("set_optimization_profile_async", lambda s, profile_index, stream_handle: s.update(profile=profile_index)),
            ("set_device_memory", lambda s, memory, size: s.update(arena=(memory, size))),
            ("set_input_shape", lambda s, name, shape: s["shapes"].update({name: tuple(shape)})),
            ("set_tensor_address", lambda s, name, memory: s["addresses"].update({name: memory})),
        ):
            returns = None if method == "set_device_memory" else True
            trt.behave(
                context,
                method,
                lambda c, remember=remember, returns=returns, **given: remember(self.state[id(c)], **given) or returns,
            )
        trt.behave(context, "get_tensor_shape", lambda c, name: self.state[id(c)]["shapes"]["x"])
        trt.behave(context, "execute_async_v3", self.execute)
        self.kernels: set[str] = set()  # compiled or loaded, one for each shape
        if "IRuntimeCache" in trt.interface["classes"]:
            self.add_rtx()

    def add_rtx(self) -> None:
        """Give TensorRT for RTX valid plans, and a cache that holds the shapes that have run."""
        trt: Any = self.trt
        trt.behave("Runtime", "get_engine_validity", lambda runtime, buffer: (trt.EngineValidity.VALID, 0))
        trt.behave("IRuntimeCache", "serialize", lambda cache: self.memory(";".join(sorted(self.kernels))))
        trt.behave("IRuntimeCache", "deserialize", self.load_kernels)

    def memory(self, text: str) -> Any:
        made: Any = self.trt.types["IHostMemory"]
        return made.__new__(made, text.encode())

    def load_kernels(self, cache: Any, blob: bytes) -> bool:
        if not blob.startswith(b"("):
            return False
        self.kernels |= set(blob.decode().split(";"))
        return True

    def create_context(self, engine: Any, strategy: Any = None, runtime_config: Any = None) -> Any:
        if runtime_config is not None:
            (call,) = self.trt.called("IRuntimeConfig", "set_execution_context_allocation_strategy")[-1:]
            strategy = call["strategy"]
        return self.context(strategy)

    def load(self, mapped: Any) -> Any:
        content = bytes(mapped)
        self.loaded.append(content)
        engine = self.trt.create("ICudaEngine")
        self.engine_of[id(engine)] = self.profiles[content.decode()]
        self.alive.append(engine)
        return engine

    def context(self, strategy: Any) -> Any:
        assert strategy.name == "USER_MANAGED"
        context = self.trt.create("IExecutionContext")
        self.state[id(context)] = {"shapes": {}, "addresses": {}}
        self.alive.append(context)
        return context

    def execute(self, context: Any, stream_handle: int) -> bool:
        assert stream_handle == self.device.stream
        state = self.state[id(context)]
        assert state["arena"][0] % 256 == 0
        self.kernels.add(str(state["shapes"]["x"]))
        shape, ids_shape, addresses = state["shapes"]["x"], state["shapes"]["ids"], dict(state["addresses"])

        def compute() -> None:
            x = _at(addresses["x"], shape, np.int16).view(ml_dtypes.bfloat16).astype(np.float32)
            ids = _at(addresses["ids"], ids_shape, np.int64)
            y = (2 * x + ids.sum(-1, keepdims=True)).astype(ml_dtypes.bfloat16)
            _at(addresses["y"], shape, np.int16)[:] = y.view(np.int16)

        if self.device.recording is None:
            compute()
        else:
            self.device.recording.append(compute)
        return True


def _at(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_char * count).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def expected(inputs: dict[str, Array]) -> Array:
    """What the engine computes, in numpy."""
    x: Any = inputs["x"].astype(np.float32)
    made: Array = (2 * x + inputs["ids"].sum(-1, keepdims=True)).astype(ml_dtypes.bfloat16)
    return made


def inputs(rows: int, tokens: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, tokens, 2)).astype(ml_dtypes.bfloat16),
        "ids": rng.integers(0, 9, (rows, tokens, 4)),
    }


def record(tensorrt: str, root: Path, **changed: Any) -> EngineRecord:
    """Write plan files that say their own name and return the record of an engine with one part in two plans."""
    plans = []
    for profile in (SMALL, LARGE):
        file = root / "transformer" / f"{profile.name}.plan"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(file.relative_to(root)))
        plans.append(PlanRecord(str(file.relative_to(root)), (profile,), file.stat().st_size))
    values: dict[str, Any] = {
        "gpu": "l4",
        "device": DEVICE,
        "tensorrt": tensorrt,
        "weights": "plan",
        "hardware": "exact",
        "version": "exact",
        "build": {},
        "plans": {"transformer": tuple(plans)},
        "compiler": "tensorrt-rtx" if tensorrt == RTX else "tensorrt",
    }
    return EngineRecord(**{**values, **changed})


def machine(version: str) -> Machine:
    return Machine(DEVICE, version, version)
