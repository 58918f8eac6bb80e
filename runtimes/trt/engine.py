"""A part in TensorRT as an engine: profiles by token count, one CUDA graph per shape, tensors by address.

The first call with a shape runs without a graph, which completes TensorRT's deferred initialization, and is then
captured. Later calls are an upload, a replay and a download. TensorRT for RTX records graphs by itself, because it
replaces kernels while it runs; with it every call is enqueued. A batch larger than its profile is split; an image
larger than every profile is rejected.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from kit.cuda_device import Machine, this_machine
from kit.engine import Array
from kit.errors import ArtifactError, EngineError, UsageError
from kit.ports import PartName, Port, Ports
from runtimes.input_sizes import input_sizes
from runtimes.trt.cuda import Cuda, Device
from runtimes.trt.plans import Arena, Context, Plans
from runtimes.trt.profiles import choose
from runtimes.trt.record import EngineRecord, mismatch
from runtimes.uploads import Uploads

KEPT_SHAPES = 16  # prepared shapes per part; each keeps inputs, outputs and a graph on the GPU


@dataclass
class Prepared:
    """The state of one shape: its context, its tensors on the GPU and its graph."""

    context: Context
    tensors: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # shapes of the inputs
    replay: Callable[[], None] | None = None
    uploaded: Uploads = field(default_factory=Uploads)


class TensorRtEngine:
    """One part of an engine artifact."""

    def __init__(self, ports: Ports, plans: Plans, device: Device, lock: threading.Lock, graphs: bool = True) -> None:
        self.ports = ports
        self._plans = plans  # owns the runtime and the engines
        self._contexts: Sequence[Context] = plans.contexts()
        self._device = device
        self._lock = lock
        self._graphs = graphs
        self._prepared: OrderedDict[tuple[tuple[int, ...], ...], Prepared] = OrderedDict()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run in as many calls as the largest batch of the profile requires; raises EngineError for other shapes."""
        sizes = input_sizes(self.ports, inputs)
        try:
            chosen = self._contexts[choose([c.profile for c in self._contexts], sizes)]
        except UsageError as error:
            raise EngineError(str(error)) from None
        rows, most = sizes["batch"], chosen.profile.axes["batch"].high
        with self._lock:
            if rows <= most:
                return self._call(chosen, inputs)
            parts = [
                self._call(chosen, {name: array[start : start + most] for name, array in inputs.items()})
                for start in range(0, rows, most)
            ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def load_weights(self, graph: Path) -> None:
        """Replace the weights of plans that have them as inputs by those of another graph of the same form.

        Calls wait meanwhile. Raises ArtifactError, with the reason, if the weights are in the plans or do not fit.
        """
        if self._plans.weights is None:
            raise ArtifactError("the weights are in the plans; build the engine with --weights inputs to exchange them")
        with self._lock:
            self._plans.weights.load(graph)

    def _call(self, chosen: Context, inputs: Mapping[str, Array]) -> dict[str, Array]:
        key = tuple(inputs[port.name].shape for port in self.ports.inputs)
        ready = self._prepared.pop(key, None)  # reinserted as the newest if the call succeeds
        try:
            if ready is None:
                ready = self._prepare(chosen, key)
            ready.uploaded.send(self._device, (port.name for port in self.ports.inputs), ready.tensors, inputs)
            self._execute(ready)
            outputs = {port.name: self._device.download(ready.tensors[port.name]) for port in self.ports.outputs}
        except RuntimeError as error:  # torch: out of memory, or a CUDA error
            raise EngineError(f"the GPU failed: {error}") from error
        self._prepared[key] = ready
        if chosen.rtx is not None:
            chosen.rtx.count_call()
        return outputs

    def _execute(self, ready: Prepared) -> None:
        if ready.replay is not None:
            ready.replay()
            return
        self._enqueue(ready)
        if self._graphs:
            ready.replay = self._device.capture(lambda: self._enqueue(ready))

    def _prepare(self, chosen: Context, key: tuple[tuple[int, ...], ...]) -> Prepared:
        """Allocate the tensors of a shape; those used least recently are freed."""
        while len(self._prepared) >= KEPT_SHAPES:
            self._prepared.popitem(last=False)
        shapes = {port.name: shape for port, shape in zip(self.ports.inputs, key, strict=True)}
        self._set_shapes(chosen, shapes)
        tensors: dict[str, Any] = {}
        for port in self.ports.inputs:
            tensors[port.name] = self._device.empty(shapes[port.name], port.dtype)
        for port in self.ports.outputs:
            tensors[port.name] = self._device.empty(self._output_shape(chosen, port), port.dtype)
        return Prepared(chosen, tensors, shapes)

    def _output_shape(self, chosen: Context, port: Port) -> tuple[int, ...]:
        shape = tuple(chosen.context.get_tensor_shape(port.name))
        if any(size < 0 for size in shape):
            raise EngineError(f"the shape of output {port.name} cannot be inferred from the inputs: {list(shape)}")
        return shape

    def _set_shapes(self, chosen: Context, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not chosen.context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT rejects shape {list(shape)} of {name}: {self._plans.log}")
        if missing := chosen.context.infer_shapes():
            raise EngineError(f"TensorRT needs the shapes or values of {', '.join(missing)}")
        chosen.shapes = dict(shapes)

    def _enqueue(self, ready: Prepared) -> None:
        chosen = ready.context
        if chosen.shapes != ready.shapes:
            self._set_shapes(chosen, ready.shapes)
        for name, tensor in ready.tensors.items():
            if not chosen.context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"TensorRT rejects the address of {name}: {self._plans.log}")
        if not chosen.context.execute_async_v3(self._device.stream):
            raise EngineError(f"TensorRT failed to run: {self._plans.log}")


def open_engines(
    root: Path,
    record: EngineRecord,
    ports: Mapping[PartName, Ports],
    device: Device | None = None,
    machine: Machine | None = None,
    graphs: bool = True,
) -> dict[PartName, TensorRtEngine]:
    """Load the parts named in `ports` from an engine artifact; they share one arena.

    The compiler that built the engine must be active (kit.compilers); runtimes.open activates it. Raises ArtifactError,
    which says why, if the engine was built for another GPU or TensorRT.
    """
    here = machine or this_machine()
    if why := mismatch(record, Machine(here.device, trt.__version__, trt.__version__)):
        raise ArtifactError(why)
    device = device or Cuda()
    arena, lock = Arena(device), threading.Lock()
    plans = {part: Plans(root, part, record, device, arena, here.device, graphs) for part in ports}
    if record.weights == "stream":
        arena.allocate()  # activations first: streamed weights use the remaining memory
        for loaded in plans.values():
            loaded.share_budget(sum(others.streamable for others in plans.values()))
    captured = graphs and record.compiler == "tensorrt"
    return {part: TensorRtEngine(ports[part], loaded, device, lock, captured) for part, loaded in plans.items()}
