"""A part in ONNX Runtime on a GPU: tensors stay at fixed addresses there, and each shape has its CUDA graph.

A read-only input, such as the embeddings and position ids of a request, is uploaded once and stays on the GPU from step
to step. Latents cross at every step, because the scheduler advances them in numpy: 1 MB for an image of one megapixel.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kit.dtypes import onnx_type
from kit.engine import Array
from kit.errors import ArtifactError, EngineError, UsageError
from kit.ports import Ports
from kit.providers import Provider
from runtimes.input_sizes import input_sizes
from runtimes.ort.assignment import RECORD, Assignment, assignment
from runtimes.ort.providers import Plan, next_options, options, register
from runtimes.trt.cuda import Device
from runtimes.trt.profiles import choose
from runtimes.uploads import Uploads

KEPT_SHAPES = 16  # prepared shapes; each keeps inputs, outputs and a graph on the GPU


@dataclass
class Prepared:
    """One shape: its tensors on the GPU, bound to the session."""

    binding: Any
    options: Any  # of a run
    graph_id: int
    tensors: Mapping[str, Any]
    uploaded: Uploads = field(default_factory=Uploads)


class BoundEngine:
    """A graph in a session of a GPU provider."""

    def __init__(
        self, graph: Path, ports: Ports, row: Provider, plan: Plan, device: Device, kind: str = "cuda"
    ) -> None:
        """Open a session; `kind` is ONNX Runtime's word for the device that has the tensors.

        Raises UsageError if the provider cannot be loaded, and ArtifactError if it cannot run the graph or would leave
        nodes to the CPU.
        """
        self.ports = ports
        self._row, self._plan, self._device, self._kind = row, plan, device, kind
        self.session = open_session(graph, ports, row, plan, device.stream)
        self.assigned: Assignment = assignment(self.session, graph)
        if row.on_gpu:
            self.assigned.require_gpu(graph, row.title)
        self._lock = threading.Lock()
        self._prepared: OrderedDict[tuple[tuple[int, ...], ...], Prepared] = OrderedDict()
        self._next_id = 1

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run in as many calls as the largest batch requires; raises EngineError for sizes outside the profile."""
        sizes = input_sizes(self.ports, inputs)
        try:
            choose([self._plan.profile], sizes)
        except UsageError as error:
            raise EngineError(str(error)) from None
        most = self._plan.profile.axes["batch"].high
        with self._lock:
            made = [self._call(_rows(inputs, start, most)) for start in range(0, sizes["batch"], most)]
        return made[0] if len(made) == 1 else {name: np.concatenate([m[name] for m in made]) for name in made[0]}

    def _call(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        key = tuple(inputs[port.name].shape for port in self.ports.inputs)
        ready = self._prepared.pop(key, None)  # reinserted as the newest if the call succeeds
        try:
            if ready is None:
                ready = self._prepare(inputs)
            ready.uploaded.send(self._device, (port.name for port in self.ports.inputs), ready.tensors, inputs)
            self.session.run_with_iobinding(ready.binding, ready.options)
            outputs = {port.name: self._device.download(ready.tensors[port.name]) for port in self.ports.outputs}
        except Exception as error:  # the error types of onnxruntime and of torch have no common base but Exception
            raise EngineError(f"{self._row.title} failed: {error}") from error
        self._prepared[key] = ready
        return outputs

    def _prepare(self, inputs: Mapping[str, Array]) -> Prepared:
        """Allocate and bind the tensors of a shape; those used least recently are freed, with their graph."""
        import onnxruntime as ort

        while len(self._prepared) >= KEPT_SHAPES:
            _, old = self._prepared.popitem(last=False)
            if self._plan.graphs and self._row.graph_id:
                self.session.release_captured_graph(old.graph_id)
        sizes = input_sizes(self.ports, inputs)
        binding = self.session.io_binding()
        tensors: dict[str, Any] = {}
        for ports, bind in ((self.ports.inputs, binding.bind_input), (self.ports.outputs, binding.bind_output)):
            for port in ports:
                shape = port.shape(sizes)
                tensors[port.name] = made = self._device.empty(shape, port.dtype)
                bind(port.name, self._kind, self._plan.device, int(onnx_type(port.dtype)), shape, made.data_ptr())
        run_options = ort.RunOptions()
        if self._plan.graphs and self._row.graph_id:
            run_options.add_run_config_entry(self._row.graph_id, str(self._next_id))
        self._next_id += 1
        return Prepared(binding, run_options, self._next_id - 1, tensors)


def _rows(inputs: Mapping[str, Array], start: int, most: int) -> Mapping[str, Array]:
    """Return at most `most` rows of every input; the arrays themselves if these are all."""
    if start == 0 and all(len(array) <= most for array in inputs.values()):
        return inputs
    return {name: array[start : start + most] for name, array in inputs.items()}


def open_session(graph: Path, ports: Ports, row: Provider, plan: Plan, stream: int | None = None) -> Any:
    """Open a session whose first provider is `row`, with a stream of its own unless one is given.

    Raises UsageError if ONNX Runtime would go on without the provider.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(RECORD, "1")
    chosen = options(row, ports, plan, stream)
    try:
        if row.plugin:
            devices = register(row, ort)
            if not devices:
                raise UsageError(f"{row.title} finds no GPU that it runs on; it runs on {', '.join(row.targets)}")
            settings.add_provider_for_devices(devices[:1], chosen)
            session = ort.InferenceSession(str(graph), settings)
        else:
            if row.title not in ort.get_available_providers():
                raise UsageError(f"ONNX Runtime {ort.__version__} has no {row.title}: {row.install}")
            providers = [(row.title, chosen), *next_options(row, plan, stream)]
            session = ort.InferenceSession(str(graph), settings, providers=providers)
    except UsageError:
        raise
    except Exception as error:  # onnxruntime raises a dozen error types for an invalid model
        raise ArtifactError(f"{graph}: {row.title} cannot load it: {error}") from error
    if row.title not in session.get_providers():
        others = ", ".join(session.get_providers())
        raise UsageError(f"ONNX Runtime could not load {row.title} and fell back to {others}: {row.install}")
    return session
